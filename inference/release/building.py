"""A training's output folder to one release asset, and that asset checked as its user gets it."""

import json
import shutil
import tempfile
from pathlib import Path

from inference.package import package
from inference.release.assets import NOTES, check_sums, models, pack, put, shorten, unpack
from inference.release.hearing import heard, listen, recordings
from inference.release.limits import limits, plural
from inference.report.commands import command_of
from inference.report.folder import Run
from inference.report.rates import estimate, word_counts
from modules.checks import check_writable
from modules.digests import SUMS, sha256
from modules.errors import UserError
from modules.tensors import load_tensors

KINDS = {
    "float32": "Weights in float32, as trained.",
    "float24": "Matrices in float32 without the last 8 bits, a change of at most 1 in 65,536.",
    "float16": "Matrices in float16 on disk; loaded, they are float32.",
}
LICENCE = "\n## Licence\n"


def build(run, name, output, data_folder=None, dtype="auto", megabytes=30, tolerance=0.5,
          notes="", device="cpu", say=print):  # fmt: skip
    """Package, pack, unpack elsewhere, hear the test sets, and put the files into `output`.

    dtype: how matrices are stored, they compute in float32: float32, float24, float16, or auto,
    the first of them that makes no more than so many megabytes. tolerance: points of WER by which
    the package may differ from the run's own test stage, which another device may have done.
    UserError, with `output` as it was, for whatever does not hold.
    """
    run, output = Run(run), Path(output).absolute()
    check_writable("output", output)
    models(output)  # a foreign file there is told before hours of hearing
    if run.settings.get("resume") and not notes:
        raise UserError(
            f"{run.path} began with the weights of {run.settings['resume']}: give --notes, a file "
            "that says what those had learnt from"
        )
    paths = {
        i: path
        for test_set, utterances in run.test_sets.items()
        for i, path in recordings(
            run.path, test_set, [u.id for u in utterances], data_folder
        ).items()
    }
    with tempfile.TemporaryDirectory(prefix="mamba-asr-release-") as scratch:
        scratch = Path(scratch)
        whole = package(run.path, scratch / "whole" / name)
        say(f"{name}: hearing {plural(len(paths), 'recording')} with the weights as trained")
        expected = heard(whole, paths, device)
        agreement, wer = against_run(run, expected, tolerance)
        checked = f"{plural(len(paths), 'test recording')} {agreement}"
        card_of = lambda weights: limits(run, weights, checked) + notes  # noqa: E731
        built, used = smallest(whole, scratch / "built", dtype, megabytes, card_of)
        archive = built / f"{name}.tar.gz"
        say(f"{name}: {used}, {archive.stat().st_size / 1e6:.1f} MB; hearing them as unpacked")
        unpacked = unpack(archive, scratch / "unpacked")
        same_texts(listen(unpacked, paths, device), expected, f"{used} weights")
        facts = {
            "file": archive.name,
            "bytes": archive.stat().st_size,
            "sha256": sha256(archive),
            "dtype": used,
            "parameters": sum(w.numel() for w in load_tensors(whole / "model.ckpt").values()),
            "wer": {n: str(estimate([word_counts(u)])) for n, u in run.test_sets.items()},
            "wer as unpacked": wer,
            "command": training_command(run),
            "texts": expected,
        }
        text = json.dumps(facts, indent=1, ensure_ascii=False)
        (built / f"{name}.json").write_text(text + "\n", encoding="utf-8")
        shutil.copyfile(unpacked / "README.md", built / f"{name}.md")
        put(built, output)
    say(f"{name}: {checked}")
    return facts


def training_command(run):
    """What trained it, for who wants to train on; None where the folder does not tell."""
    try:
        return command_of(run)[0]
    except UserError:
        return None


def smallest(whole, built, dtype, megabytes, card_of):
    """(folder with the archive, its weights' type): the first type that is small enough."""
    built.mkdir()
    archive = built / f"{whole.name}.tar.gz"
    sizes = []
    for kind in KINDS if dtype == "auto" else (dtype,):
        folder = built.parent / kind / whole.name
        shutil.copytree(whole, folder)
        if kind != "float32":
            shorten(folder / "model.ckpt", kind)
        add_limits(folder / "README.md", card_of(KINDS[kind]))
        pack(folder, archive)
        if archive.stat().st_size <= megabytes * 1e6:
            return built, kind
        sizes.append(f"{archive.stat().st_size / 1e6:.1f} MB in {kind}")
    raise UserError(
        f"{whole.name} has {' and '.join(sizes)}, and {megabytes:g} MB are allowed; release a "
        "smaller model, or give --dtype float16 or another --megabytes"
    )


def add_limits(card, text):
    """Put what the model is not before the card's licence."""
    before, licence, after = card.read_text(encoding="utf-8").partition(LICENCE)
    assert licence, f"{card} has no licence"
    card.write_text(f"{before}\n{text}{licence}{after}", encoding="utf-8")


def against_run(run, texts, tolerance):
    """Hold texts against those of the run's test stage: (how they agree, {test set: WER}).

    UserError where a test set's WER differs by more than the tolerance.
    """
    heard = {u.id: " ".join(u.hypothesis) for us in run.test_sets.values() for u in us}
    different = sorted(i for i in heard if heard[i] != texts[i])
    rates = {}
    for name, utterances in run.test_sets.items():
        then = estimate([word_counts(utterances)]).value
        rates[name] = round(error_rate(utterances, texts), 2)
        if abs(then - rates[name]) > tolerance:
            raise UserError(
                f"{name}: the package has WER {rates[name]:.2f}, and the run's test stage had "
                f"{then:.2f}, with {len(different)} other texts ({different[0]} first); was the "
                "last evaluation another search, or did the weights change? See --tolerance"
            )
    if not different:
        return "with the texts of the training's own test stage, every one.", rates
    return (
        f"with the texts of the training's own test stage but for {len(different)} (another "
        f"device rounds otherwise); WER {', '.join(f'{n} {r:.2f}' for n, r in rates.items())}.",
        rates,
    )


def error_rate(utterances, texts):
    """WER of texts {id: text} on the references of utterances, percent."""
    from speechbrain.utils.metric_stats import ErrorRateStats

    stats = ErrorRateStats()
    for u in utterances:
        stats.append([u.id], [texts[u.id].split()], [u.reference])
    return stats.summarize("error_rate")


def same_texts(found, expected, what):
    """UserError unless all texts are the same."""
    different = sorted(i for i in expected if found[i] != expected[i])
    if different:
        first = different[0]
        raise UserError(
            f"{what} change {len(different)} of {len(expected)} texts, {first} first: "
            f"{expected[first]!r} became {found[first]!r}; give --dtype float32 and a larger "
            "--megabytes, or release another model"
        )


def check(output, data_folder=None, device="cpu", say=print):
    """Check a folder of release assets as downloaded: sums, and every package loads and hears."""
    output = Path(output)
    listed, found = check_sums(output), models(output)
    if not found:
        raise UserError(f"{output} holds no model's NAME.json; copy all of the release's files")
    wanted = [n for p in found for n in (p.name, f"{p.stem}.md", f"{p.stem}.tar.gz")]
    if (output / NOTES).exists():
        wanted.append(NOTES)
    if missing := [name for name in wanted if name not in listed]:
        raise UserError(f"{output / SUMS} has no {missing[0]}; copy the file of sums again")
    for facts in found.values():
        with tempfile.TemporaryDirectory(prefix="mamba-asr-release-") as scratch:
            package_folder = unpack(output / facts["file"], scratch)
            if data_folder is None:
                listen(package_folder, {}, device)
                say(f"{facts['file']}: sums agree, it loads (no --data_folder: nothing heard)")
                continue
            paths = recordings(scratch, "", list(facts["texts"]), data_folder)
            same_texts(listen(package_folder, paths, device), facts["texts"], "these files")
            say(f"{facts['file']}: sums agree, {plural(len(paths), 'text')} as released")
