"""A split in the making: by one run at a time, in chapters, and a stopped run goes on."""

import contextlib
import json
import os
import shutil
import sys
from pathlib import Path

import soundfile as sf
from filelock import FileLock, Timeout
from tqdm import tqdm

from demo.processes import map_in_processes
from modules.errors import UserError
from modules.whole import whole


class Split:
    """A folder of chapters. Until it is complete it is `<folder>.partial`.

    Arguments
    ---------
    folder : path
    marker : str
        The file in it that tells which options made it.
    config : dict
        Those options, as JSON gives them back.
    """

    def __init__(self, folder, marker, config):
        self.folder, self.marker, self.config = Path(os.path.abspath(folder)), marker, config
        self.partial = self.folder.with_name(f"{self.folder.name}.partial")

    def made(self):
        """The hours of a split that is there already, or None; UserError when others made it."""
        for folder in (self.folder, self.partial):
            self._check_ours(folder)
        hours = self._read(self.folder).get("hours")
        if hours is not None:
            print(f"{self.folder}: made before with the same options, kept")
        return hours

    def _check_ours(self, folder):
        if not folder.exists():
            return
        before = self._read(folder).get("config")
        inside = list(folder.iterdir()) if folder.is_dir() else [folder]
        if before == self.config or not inside:
            return
        if before and not any(path.is_dir() for path in inside):
            (folder / self.marker).unlink()  # there is no chapter yet
            return
        differ = [key for key in self.config if before and before.get(key) != self.config[key]]
        reason = f"other options ({', '.join(differ)})" if before else "something else"
        raise UserError(f"{folder} was made by {reason}; give another name, or remove that folder")

    def _read(self, folder):
        try:
            return json.loads((folder / self.marker).read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return {}

    @contextlib.contextmanager
    def making(self):
        """Have `partial` to oneself, which becomes the folder when the block ends well."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with held(self.folder):
            if self.made() is not None:
                raise UserError(f"another run has just made {self.folder}")
            self.partial.mkdir(exist_ok=True)
            self.note()
            yield self.partial
            os.rename(self.partial, self.folder)

    def noted(self, name):
        """What `note` keeps by a name, or None."""
        return self._read(self.partial).get(name)

    def note(self, **more):
        """Keep the options, and more, in `partial`."""
        content = {"config": self.config, **self._read(self.partial), **more}
        with whole(self.partial / self.marker) as beside:
            beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    def make(self, make_chapter, chapters, workers):
        """Make the chapters that are not there yet, in processes; returns the hours of all.

        A chapter has a `folder`, in `partial`, and its `count` of utterances. `make_chapter`
        (chapter) makes the folder and returns seconds.
        """
        there = [chapter for chapter in chapters if os.path.isdir(chapter.folder)]
        missing = [chapter for chapter in chapters if not os.path.isdir(chapter.folder)]
        seconds = sum(map(seconds_of, there))
        if there:
            print(f"{len(there)} chapters of {len(chapters)} are there already, and kept")
        total = sum(chapter.count for chapter in missing)
        with tqdm(total=total, unit=" utterances", disable=not sys.stderr.isatty()) as progress:
            for chapter, length in map_in_processes(make_chapter, missing, workers):
                seconds += length
                progress.update(chapter.count)
                progress.set_postfix_str(f"{seconds / 3600:.2f} h", refresh=False)
        self.note(hours=round(seconds / 3600, 2))
        return seconds / 3600


@contextlib.contextmanager
def held(folder):
    """UserError while another run is making a folder; a killed run lets go of it."""
    path = folder.with_name(f".{folder.name}.lock")
    try:
        with FileLock(path, timeout=0):
            yield
    except Timeout:
        if not path.exists():  # which filelock does not tell from one that is held
            raise UserError(f"{folder.parent} cannot be written to; give another folder") from None
        raise UserError(f"another run is writing {folder}; wait for it") from None


def write_chapter(chapter, utterances, rate):
    """Write pairs (text, samples) as FLAC files and a transcript; returns seconds of speech.

    The chapter's folder, <speaker>/<number>, is there when all of it is.
    """
    folder = Path(chapter.folder)
    beside = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)  # of a run that was killed
    beside.mkdir(parents=True)
    chapter_id, seconds, lines = f"{folder.parent.name}-{folder.name}", 0.0, []
    for i, (text, samples) in enumerate(utterances):
        name = f"{chapter_id}-{i:04d}"
        sf.write(beside / f"{name}.flac", samples, rate, subtype="PCM_16")
        seconds += len(samples) / rate
        lines.append(f"{name} {text}\n")
    (beside / f"{chapter_id}.trans.txt").write_text("".join(lines), encoding="utf-8")
    os.rename(beside, folder)
    return seconds


def seconds_of(chapter):
    return sum(sf.info(str(file)).duration for file in Path(chapter.folder).glob("*.flac"))
