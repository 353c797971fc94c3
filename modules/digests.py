"""Digests of a checkpoint's files, which tell a whole one from a damaged one."""

import functools
import hashlib
import os
import zipfile

import yaml
from speechbrain.utils.checkpoints import METAFNAME

# As coreutils write it: `sha256sum -c SHA256SUMS` checks a checkpoint by hand.
SUMS = "SHA256SUMS"


def seal(folder):
    """Write the digests of a folder's files, and bring all of it to the disk."""
    files = sorted(folder.iterdir())
    for file in files:
        sync(file)
    lines = [f"{sha256(file)}  {file.name}\n" for file in files]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")
    sync(folder / SUMS)
    sync(folder)


def damage(folder):
    """What is wrong with a checkpoint's folder, in words; None when nothing is.

    Files that have not changed since this process looked are not read again.
    """
    try:
        stats = [(file.name, file.stat()) for file in sorted(folder.iterdir())]
    except FileNotFoundError:
        return "it is deleted while it is read"
    return _damage(folder, tuple((name, s.st_ino, s.st_size, s.st_mtime_ns) for name, s in stats))


@functools.cache
def _damage(folder, files):
    names = {name for name, *_ in files}
    if METAFNAME not in names:
        return f"{METAFNAME} is missing"
    try:
        return digest_differs(folder, names) if SUMS in names else looks_wrong(folder, names)
    except OSError as error:
        return f"it cannot be read: {error}"


def digest_differs(folder, names):
    """The first file that is not what was written."""
    text = (folder / SUMS).read_text(encoding="utf-8", errors="replace")
    digests = {name: digest for digest, _, name in (s.partition("  ") for s in text.splitlines())}
    for name in sorted(digests.keys() | {n for n in names if n.endswith(".ckpt")} | {METAFNAME}):
        if name not in digests:
            return f"{name} is not in {SUMS}"
        if name not in names:
            return f"{name} is missing"
        if sha256(folder / name) != digests[name]:
            return f"{name} does not have the digest in {SUMS}"
    return None


def looks_wrong(folder, names):
    """What a kill or a full disk leaves, in a checkpoint of earlier versions without digests."""
    try:
        with open(folder / METAFNAME, encoding="utf-8") as file:
            meta = yaml.safe_load(file)
    except (UnicodeDecodeError, yaml.YAMLError):
        meta = None
    if not isinstance(meta, dict) or not {"unixtime", "end-of-epoch"} <= meta.keys():
        return f"{METAFNAME} cannot be read"
    if "model.ckpt" not in names:
        return "model.ckpt is missing"
    for name in sorted(n for n in names if n.endswith(".ckpt")):
        with open(folder / name, "rb") as file:
            begins = file.read(2)
        if not begins:
            return f"{name} is empty"
        # PyTorch writes zip archives, whose directory comes last.
        if (begins == b"PK" or name == "model.ckpt") and not zipfile.is_zipfile(folder / name):
            return f"{name} is cut off"
    return None


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sync(path):
    """Bring a file, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
