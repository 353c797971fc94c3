"""What a command line names -> recordings, and the file that each transcript goes to."""

import codecs
import glob
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from inference.decode import PYAV_SUFFIXES, SUFFIXES
from modules.errors import UserError
from modules.folders import files_below

STDIN = "-"
ESCAPED = "mamba_asr.escaped"  # how `escaped` is known to codecs


@dataclass(frozen=True)
class Job:
    """One recording: `name` as the user knows it, `path` to read, `output` to write or None."""

    name: str
    path: Path
    output: Path | None = None


def find(inputs, stdin):
    """Files, folders, globs and "-" -> [(name, path, stem of the output)], each file once.

    stdin: the path that holds what came from there. Folders are searched through, for the suffixes
    of audio; their files keep their place below the folder. A file that does not exist is kept:
    reading it tells why. UserError for a folder or glob without recordings.
    """
    found = {}
    for given in inputs:
        if given == STDIN:
            found[STDIN] = (STDIN, stdin, "stdin")
            continue
        if Path(given).is_dir():
            paths = recordings_below(Path(given))
            stems = [p.relative_to(given).with_suffix("") for p in paths]
        else:
            paths = globbed(given)
            stems = [p.stem for p in paths]
        for path, stem in zip(paths, stems, strict=True):
            found.setdefault(path.resolve(), (str(path), path, stem))
    return list(found.values())


def recordings_below(folder):
    suffixes = {*SUFFIXES, *PYAV_SUFFIXES}
    paths = [p for p in files_below(folder) if p.suffix.lower() in suffixes]
    if not paths:
        raise UserError(
            f"the folder {folder} holds no recording ({', '.join(sorted(suffixes))}); name the "
            "files, or give another folder"
        )
    return paths


def globbed(given):
    """A path, or what a glob that the shell left alone matches."""
    if Path(given).exists() or not glob.has_magic(given):
        return [Path(given)]
    paths = [Path(p) for p in sorted(glob.glob(given, recursive=True)) if Path(p).is_file()]
    if not paths:
        raise UserError(f"no file matches {given!r}; look at the pattern")
    return paths


def jobs_of(found, folder, suffix, overwrite):
    """Found recordings -> Jobs; UserError when two would write one file, or one is there already.

    folder: where the transcripts go, or None for none.
    """
    if folder is None:
        return [Job(name, path) for name, path, _ in found]
    jobs = {}
    for name, path, stem in found:
        output = Path(folder) / f"{stem}.{suffix}"
        if output in jobs:
            raise UserError(
                f"{jobs[output].name} and {name} would both be written to {output}; rename one, or "
                "transcribe them into two folders"
            )
        jobs[output] = Job(name, path, output)
    there = [str(output) for output in jobs if output.exists()]
    if there and not overwrite:
        more = f" and {len(there) - 1} more" if len(there) > 1 else ""
        raise UserError(f"{there[0]}{more} exists; give --overwrite, or another --output-dir")
    return list(jobs.values())


def write(text, output):
    """Write a file at once: beside its place, then renamed."""
    output.parent.mkdir(parents=True, exist_ok=True)
    # Without the output's name, which may be as long as names can be.
    handle, beside = tempfile.mkstemp(prefix=".transcript-", dir=output.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", errors=ESCAPED, newline="\n") as file:
            file.write(text)
        os.chmod(beside, 0o666 & ~umask())
        os.replace(beside, output)
    except BaseException:
        os.unlink(beside)
        raise


def escaped(error):
    """For codecs: what an encoding lacks, stray bytes of a file's name too, as JSON escapes it."""
    units = error.object[error.start : error.end].encode("utf-16-be", "surrogatepass")
    return "\\u" + units.hex("|", 2).replace("|", "\\u"), error.end


codecs.register_error(ESCAPED, escaped)


def umask():
    """The mask that a new file gets; mkstemp's own are the owner's alone."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
