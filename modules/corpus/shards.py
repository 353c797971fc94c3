"""A prepared split as tar files for WebDataset: what one disk serves badly, as streams.

`<folder>/<split>-00000.tar` ... hold each utterance's audio, byte for byte, and its text;
`<folder>/<split>.csv` is the manifest, whose `wav` names the shard in place of the file.
"""

import csv
import hashlib
import io
import json
import math
import os
import random
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

from tqdm import tqdm

from modules.corpus.store import locked, write_files
from modules.errors import UserError

NEEDED = "reading and writing shards needs WebDataset: pip install webdataset==1.0.2"


def webdataset():
    """The library, or a UserError that says how to get it."""
    try:
        import webdataset
    except ImportError as error:
        raise UserError(NEEDED) from error
    return webdataset


def key_of(utterance):
    """An utterance's name in a shard, where a dot or a slash would be read as an end of it."""
    return quote(utterance, safe="").replace(".", "%2E")


def write_shards(manifest_folder, split, folder, megabytes, workers=4):
    """Write the shards of `<manifest_folder>/<split>.csv`, then their manifest; returns how many.

    Utterances are in random order, which is the same every time, so that a shard has of all
    speakers. Shards that are there from a run that was stopped are kept.
    """
    if not megabytes > 0:
        raise UserError(f"shard-megabytes={megabytes}: expected more than 0")
    webdataset()
    with open(os.path.join(manifest_folder, f"{split}.csv"), encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    os.makedirs(folder, exist_ok=True)
    with locked(folder):
        sizes = [os.path.getsize(row["wav"]) for row in rows]
        _check_state(folder, split, rows, sizes, megabytes)
        shards = _share_out(rows, sizes, megabytes)
        names = [f"{split}-{number:05d}.tar" for number in range(len(shards))]
        missing = [i for i, name in enumerate(names) if not os.path.exists(f"{folder}/{name}")]
        with ThreadPoolExecutor(workers) as pool:
            written = pool.map(lambda i: _write(f"{folder}/{names[i]}", shards[i]), missing)
            quiet = not sys.stderr.isatty()
            for _ in tqdm(written, desc=f"{split} shards", total=len(missing), disable=quiet):
                pass
        write_files(folder, {f"{split}.csv": _manifest(names, shards)})
    return len(shards)


def _check_state(folder, split, rows, sizes, megabytes):
    """UserError where the folder has shards of something else; else note what these are of."""
    contents = [[row["ID"], row["wrd"], size] for row, size in zip(rows, sizes, strict=True)]
    digest = hashlib.sha256(json.dumps([megabytes, contents]).encode()).hexdigest()
    state = Path(folder, f"{split}.shards.json")
    if state.exists():
        if json.loads(state.read_text()) != {"digest": digest}:
            raise UserError(
                f"{folder} has shards of {split} that were written from other data or in another "
                f"size; remove {split}-*.tar and {state.name} there, or choose another folder"
            )
        return
    # Not by a pattern with a star: synth-100-00000.tar is none of the split synth.
    shard = re.compile(rf"{re.escape(split)}-\d{{5,}}\.tar")
    if there := sorted(name for name in os.listdir(folder) if shard.fullmatch(name)):
        raise UserError(f"{folder} has {there[0]} of another origin; choose another folder")
    write_files(folder, {state.name: json.dumps({"digest": digest})})


def _share_out(rows, sizes, megabytes):
    """Rows in random order, cut into shards of about equal bytes."""
    order = random.Random(len(rows)).sample(range(len(rows)), len(rows))
    count = max(1, round(sum(sizes) / (megabytes * 1e6)))
    share, shards, done = math.ceil(sum(sizes) / count), [[] for _ in range(count)], 0
    for i in order:
        shards[done // share].append(rows[i])
        done += sizes[i]
    return [shard for shard in shards if shard]


def _write(path, rows):
    """One shard, which appears when it is complete."""
    partial = f"{path}.partial"
    with open(partial, "wb") as file:
        with webdataset().TarWriter(file, mtime=0, encoder=False) as tar:
            for row in rows:
                kind = os.path.splitext(row["wav"])[1][1:].lower()
                audio, text = Path(row["wav"]).read_bytes(), row["wrd"].encode()
                tar.write({"__key__": key_of(row["ID"]), kind: audio, "txt": text})
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _manifest(names, shards):
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["ID", "duration", "wav", "spk_id", "wrd"])
    for name, rows in zip(names, shards, strict=True):
        writer.writerows([r["ID"], r["duration"], name, r["spk_id"], r["wrd"]] for r in rows)
    return file.getvalue()
