"""A release's files: NAME.tar.gz, NAME.md, NAME.json; SHA256SUMS and RELEASE.md of all models."""

import gzip
import io
import json
import re
import shutil
import tarfile
from pathlib import Path

import torch

from modules.digests import SUMS, sha256
from modules.errors import UserError
from modules.tensors import load_tensors, save_tensors
from modules.whole import whole

NOTES = "RELEASE.md"
FACTS = {"file", "bytes", "sha256", "dtype", "parameters", "wer", "texts"}  # of NAME.json
HEAD = """# Checkpoints

Small models to start from and to compare with; each card says what its model is not.
`sha256sum -c SHA256SUMS` checks the files, `python -m inference.release --check DIR` the models.
`python -m inference.release.start FILE OUTPUT` makes a folder that training can `--resume`.

| file | MB | weights | parameters | test set | WER % | sha256 |
|---|---|---|---|---|---|---|
"""


def shorten(path, kind):
    """Round a file's matrices, in place, to what is stored in fewer bytes; it loads as before.

    kind: float24, float32 without its last 8 bits, which gzip then takes off; or float16. Vectors
    and the scan's A stay float32. UserError where a weight is too large for float16.
    """
    weights = load_tensors(path)
    for name, weight in weights.items():
        if not weight.is_floating_point() or weight.dim() < 2 or name.endswith("A_log"):
            continue
        if kind == "float24":
            bits = weight.float().contiguous().view(torch.int32)
            weights[name] = ((bits + 0x80) & ~0xFF).view(torch.float32)
        else:
            weights[name] = weight.half()
        if not torch.isfinite(weights[name]).all():
            raise UserError(f"weight {name!r} is too large for {kind}; give --dtype float32")
    save_tensors(weights, path)


def pack(folder, archive):
    """A folder to NAME.tar.gz, the same bytes for the same files: no times, no owners, in order."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for path in [folder, *sorted(folder.rglob("*"))]:
            info = tarfile.TarInfo(str(path.relative_to(folder.parent)))
            info.mode = 0o755 if path.is_dir() else 0o644
            if path.is_dir():
                info.type = tarfile.DIRTYPE
                tar.addfile(info)
            else:
                info.size = path.stat().st_size
                with open(path, "rb") as file:
                    tar.addfile(info, file)
    with open(archive, "wb") as file, gzip.GzipFile("", "wb", 9, file, mtime=0) as zipped:
        zipped.write(raw.getbuffer())


def unpack(archive, folder):
    """The package inside; UserError for an archive that is damaged, or holds anything else."""
    try:
        with tarfile.open(archive, "r:gz") as tar:
            tar.extractall(folder, filter="data")
    except (OSError, EOFError, tarfile.TarError) as error:
        raise UserError(f"{archive} is damaged: {error}; copy it again") from None
    package = Path(folder) / archive.name.removesuffix(".tar.gz")
    if not (package / "config.json").is_file():
        raise UserError(f"{archive} holds no package {package.name}; build it again")
    return package


def put(built, output):
    """Copy the three files of one model to the release, then write what tells of all."""
    output.mkdir(parents=True, exist_ok=True)
    for file in sorted(built.iterdir()):  # from a scratch folder, which may be on another disk
        with whole(output / file.name) as beside:
            shutil.copyfile(file, beside)
    sum_up(output)


def models(output):
    """What the folder's models say of themselves, {file: facts}; UserError for a foreign file."""
    found = {}
    for path in sorted(output.glob("*.json")):
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
            there = isinstance(facts, dict) and facts.keys() >= FACTS
        except (OSError, ValueError, RecursionError):
            there = False
        if not there:
            raise UserError(f"{path} describes no released model; move it away, or copy it again")
        found[path] = facts
    return found


def sum_up(output):
    """SHA256SUMS and RELEASE.md of all models in the folder."""
    table = []
    for path, facts in models(output).items():
        for test_set, rate in facts["wer"].items():
            table.append(
                f"| [{facts['file']}]({path.stem}.md) | {facts['bytes'] / 1e6:.1f} | "
                f"{facts['dtype']} | {facts['parameters'] / 1e6:.2f} M | {test_set} | {rate} | "
                f"`{facts['sha256']}` |"
            )
    with whole(output / NOTES) as beside:
        beside.write_text(HEAD + "\n".join(table) + "\n", encoding="utf-8")
    files = sorted(p for p in output.iterdir() if p.is_file() and p.name != SUMS)
    lines = [f"{sha256(p)}  {p.name}\n" for p in files]
    with whole(output / SUMS) as beside:
        beside.write_text("".join(lines), encoding="utf-8")


def check_sums(output):
    """The names that SHA256SUMS has; UserError unless every such file is what it says."""
    path = output / SUMS
    if not path.is_file():
        raise UserError(f"{output} holds no {SUMS}; give the folder of a release's files")
    names = set()
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if not (parts := re.fullmatch(r"([0-9a-f]{64}) [ *](.+)", line)):
            raise UserError(f"{path} has the line {line[:80]!r}, which is no digest; copy it again")
        digest, name = parts.groups()
        names.add(name)
        if not (output / name).is_file():
            raise UserError(f"{output / name} is missing; copy it again")
        if sha256(output / name) != digest:
            raise UserError(f"{output / name} is not what {SUMS} says; copy it again")
    return names
