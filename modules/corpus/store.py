"""Writing files so that a killed run leaves either the old one or the new one, never a half."""

import contextlib
import csv
import fcntl
import hashlib
import io
import json
import logging
import os

logger = logging.getLogger(__name__)

STATE = "prepare_state.json"


@contextlib.contextmanager
def locked(folder):
    """Let one preparation at a time work in `folder`; a killed run lets go of the lock."""
    with open(os.path.join(folder, ".prepare.lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("%s: waiting for another preparation to finish", folder)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_files(folder, contents):
    """Write {name: text} into `folder`: all are safely on disk before the first gets its name."""
    partial = {name: os.path.join(folder, f".{name}.partial") for name in contents}
    for name, text in contents.items():
        with open(
            partial[name], "w", encoding="utf-8", errors="backslashreplace", newline=""
        ) as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    for name, path in partial.items():
        os.replace(path, os.path.join(folder, name))
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # the renames too
    finally:
        os.close(descriptor)


def manifest_text(utterances):
    """SpeechBrain's CSV of utterances."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["ID", "duration", "wav", "spk_id", "wrd"])
    writer.writerows([u.id, u.duration, u.audio, u.spk_id, u.text] for u in utterances)
    return file.getvalue()


def stat_row(path):
    """(path, bytes, time of change in ns), or (path,) where there is no such file."""
    try:
        status = os.stat(path)
    except OSError:
        return (path,)
    return path, status.st_size, status.st_mtime_ns


def fingerprint(stats):
    """One hash of (path, size, mtime) rows: changes when a file comes, goes or is written."""
    text = "\n".join("\t".join(map(str, row)) for row in sorted(stats))
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def remember(folder, config, contents, losses):
    """Note what `contents` (names to texts) were made from, and the lines on what was left out."""
    outputs = {name: _hash(text.encode()) for name, text in contents.items()}
    state = {"config": config, "outputs": outputs, "losses": losses}
    write_files(folder, {STATE: json.dumps(state, indent=1)})


def unchanged(folder, config):
    """The noted `losses` if `folder` still holds the untouched files of `config`, else None."""
    try:
        with open(os.path.join(folder, STATE), encoding="utf-8") as file:
            state = json.load(file)
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    if state["config"] != config:
        return None
    for name, expected in state["outputs"].items():
        path = os.path.join(folder, name)
        if not os.path.exists(path):
            return None
        with open(path, "rb") as file:
            if _hash(file.read()) != expected:
                return None
    return state["losses"]


def _hash(data):
    return hashlib.sha256(data).hexdigest()
