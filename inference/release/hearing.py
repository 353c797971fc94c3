"""What an unpacked package hears, in a process of its own with the package's own code."""

import contextlib
import csv
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

from inference.recognizer import Recognizer
from modules.errors import UserError
from modules.folders import files_below

AUDIO = (".flac", ".wav", ".mp3", ".ogg", ".opus")
# No network, and nothing of the checkout: only what the archive holds.
LISTEN = """
import socket
socket.socket.connect = None
import json, sys
from pathlib import Path
import inference
from inference import Recognizer

folder = Path(sys.argv[1]).resolve()
assert Path(inference.__file__).resolve().is_relative_to(folder), inference.__file__
recognizer = Recognizer.from_folder(folder, device=sys.argv[2])
paths = json.load(sys.stdin)
for result in recognizer.transcribe_files(paths, chunk_seconds=0):
    text = None if result.error else result.transcript.text
    print(json.dumps([result.path, text, result.error]), flush=True)
"""


def listen(folder, paths, device="cpu"):
    """Transcribe {name: path} with the package in a folder: {name: text}.

    UserError when the package does not load by itself, or a recording cannot be heard.
    """
    names = {str(path): name for name, path in paths.items()}
    environment = os.environ | {"PYTHONPATH": str(Path(folder).resolve() / "src")}
    texts = {}
    with tempfile.TemporaryDirectory() as elsewhere, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", LISTEN, str(Path(folder).resolve()), device],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=elsewhere,
            env=environment,
        )
        with process, tqdm(total=len(names), unit="file", disable=None, leave=False) as bar:
            with contextlib.suppress(BrokenPipeError):  # it ended, and has said why
                process.stdin.write(json.dumps(list(names)))
                process.stdin.close()
            for line in process.stdout:
                path, text, error = json.loads(line)
                if error:
                    process.kill()
                    raise UserError(f"the package does not hear {path}: {error}")
                texts[names[path]] = text
                bar.update()
        if process.returncode:
            errors.seek(0)
            last = errors.read().strip().splitlines()[-1:] or ["it says nothing"]
            raise UserError(f"{folder} does not work by itself: {last[0]}")
    return texts


def heard(folder, paths, device="cpu"):
    """The same by this process and the checkout's code."""
    recognizer, texts = Recognizer.from_folder(folder, device), {}
    names = {str(path): name for name, path in paths.items()}
    for result in tqdm(
        recognizer.transcribe_files(list(names), chunk_seconds=0),
        total=len(names),
        unit="file",
        disable=None,
        leave=False,
    ):
        if result.error:
            raise UserError(result.error)
        texts[names[result.path]] = result.transcript.text
    return texts


def recordings(run, test_set, ids, data_folder=None):
    """{id: path} of a test set's recordings; UserError when one is not found.

    They are looked for below data_folder, or where the run's manifest says.
    """
    found = {}
    if data_folder is None:
        manifest = Path(run) / f"{test_set}.csv"
        if manifest.is_file():
            with open(manifest, encoding="utf-8", newline="") as file:
                found = {row["ID"]: row["wav"] for row in csv.DictReader(file)}
    else:
        place = Path(data_folder) / test_set
        place = place if place.is_dir() else Path(data_folder)
        found = {p.stem: str(p) for p in files_below(place) if p.suffix.lower() in AUDIO}
    missing = [i for i in ids if not Path(found.get(i, "")).is_file()]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(ids)} recordings of {test_set or 'the test sets'} are not "
            f"found, {missing[0]} first; give --data_folder, a folder that holds them"
        )
    return {i: str(Path(found[i]).absolute()) for i in ids}
