"""A release's file works where nothing else is, and what is not as trained is not released."""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from inference.release import __main__ as script
from inference.release.assets import check_sums, pack, put, shorten, unpack
from inference.release.building import build, check
from inference.release.hearing import heard, listen
from inference.release.start import start
from inference.report.alignments import read_alignments
from modules.checkpoints import Checkpointer
from modules.digests import SUMS
from modules.errors import UserError
from modules.tensors import load_tensors
from tests.recipes import runs
from tests.recipes.packages import QUICK, RECIPES, trained
from tests.report.written import wer_text


@pytest.fixture(scope="module")
def run():
    return trained("ctc")[0]


@pytest.fixture(scope="module")
def release(run, tmp_path_factory):
    """A folder of release files, of a model whose matrices were shortened."""
    folder = tmp_path_factory.mktemp("release") / "files"
    build(run, "tones", folder, dtype="float24", notes="\nTones, not speech.\n", say=lambda _: None)
    return folder


def test_the_files_tell_what_they_are(run, release):
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=release, capture_output=True)
    assert done.returncode == 0
    names = {p.name for p in release.iterdir()}
    assert names == {"SHA256SUMS", "RELEASE.md", "tones.tar.gz", "tones.md", "tones.json"}
    facts = json.loads((release / "tones.json").read_text())
    wer = re.match(r"%WER (\S+)", (run / "wer_test-a.txt").read_text())[1]
    assert facts["wer"]["test-a"].startswith(f"{wer} [")
    assert facts["wer as unpacked"]["test-a"] == float(wer)
    assert facts["bytes"] == (release / "tones.tar.gz").stat().st_size
    assert facts["sha256"] in (release / "RELEASE.md").read_text()
    assert "--d_model 32" in facts["command"]
    card = (release / "tones.md").read_text()
    for wanted in (
        "**Not a general recogniser.** It has learnt from",
        "by 1 speaker. It has heard 6 different words and no others: ABE, BEAD, BED, CAB, DEAF",
        f"test-a: WER {facts['wer']['test-a']} (95 % interval",
        "it transcribed 8 test recordings with the texts of the training's own test stage, every",
        "\nTones, not speech.\n",
        "without the last 8 bits",
    ):
        assert wanted in card
    assert card.index("What it is not") < card.index("## Licence")


def test_downloaded_files_are_checked(release, tmp_path):
    folder = shutil.copytree(release, tmp_path / "down")
    said = []
    (tmp_path / "corpora").mkdir()
    (tmp_path / "corpora/tones").symlink_to(runs.corpus())
    check(folder, tmp_path / "corpora", say=said.append)
    assert said == ["tones.tar.gz: sums agree, 8 texts as released"]
    archive = folder / "tones.tar.gz"
    archive.write_bytes(archive.read_bytes()[:50_000])
    with pytest.raises(UserError, match=r"tones.tar.gz is not what SHA256SUMS says"):
        check(folder)
    with pytest.raises(UserError, match=r"tones.tar.gz is damaged"):
        unpack(archive, tmp_path / "x")
    archive.unlink()
    with pytest.raises(UserError, match=r"tones.tar.gz is missing"):
        check(folder)


def test_a_folder_that_tells_less_than_all_is_refused(release, tmp_path):
    folder = shutil.copytree(release, tmp_path / "down")
    sums = (folder / SUMS).read_text()
    (folder / SUMS).write_text(sums.replace("  ", " *"))  # as sha256sum -b
    check(folder, say=lambda text: None)
    for text, message in (
        ("", r"SHA256SUMS has no tones.json; copy the file of sums again"),
        (sums.replace("tones.md", "other"), "other is missing"),
        (
            "".join(line for line in sums.splitlines(True) if "RELEASE" not in line),
            r"SHA256SUMS has no RELEASE.md; copy the file of sums again",
        ),
        (sums + "cut o", "has the line 'cut o', which is no digest"),
    ):
        (folder / SUMS).write_text(text)
        with pytest.raises(UserError, match=message):
            check(folder)
    (folder / SUMS).write_text("")
    for path in folder.glob("tones.*"):
        path.unlink()
    with pytest.raises(UserError, match=r"holds no model's NAME.json"):
        check(folder)


@pytest.mark.parametrize("text", ["{}", "[]", "no JSON", '{"file": "a"}'])
def test_a_foreign_description_is_told_before_work(text, run, release, tmp_path):
    folder = shutil.copytree(release, tmp_path / "down")
    (folder / "other.json").write_text(text)
    before = runs.files_of(folder)
    for work in (lambda: build(run, "two", folder), lambda: check(folder)):
        with pytest.raises(UserError, match=r"other.json describes no released model"):
            work()
    assert runs.files_of(folder) == before


def test_a_release_on_another_disk(release, tmp_path):
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system to write to")
    shutil.copytree(release, tmp_path / "built", ignore=shutil.ignore_patterns("[A-Z]*"))
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        put(tmp_path / "built", Path(folder) / "files")
        check_sums(Path(folder) / "files")


def test_the_same_files_make_the_same_archive(run, tmp_path):
    folder = shutil.copytree(trained("ctc")[1], tmp_path / "a" / "tones")
    pack(folder, tmp_path / "1.tar.gz")
    again = shutil.copytree(folder, tmp_path / "b" / "tones")
    for path in again.rglob("*"):
        path.touch()
        path.chmod(0o700)
    pack(again, tmp_path / "2.tar.gz")
    assert (tmp_path / "1.tar.gz").read_bytes() == (tmp_path / "2.tar.gz").read_bytes()


def test_shortened_weights(tmp_path):
    torch.manual_seed(0)
    weights = {
        "a.weight": torch.randn(50, 40),
        "a.bias": torch.randn(40),
        "b.A_log": torch.randn(4, 5),
    }
    for kind, error in (("float24", 2.0**-16), ("float16", 2.0**-11)):
        torch.save(weights, tmp_path / "w.ckpt")
        shorten(tmp_path / "w.ckpt", kind)
        found = load_tensors(tmp_path / "w.ckpt")
        relative = (found["a.weight"].float() / weights["a.weight"] - 1).abs().max()
        assert 0 < relative <= error
        assert all(torch.equal(found[k], weights[k]) for k in ("a.bias", "b.A_log"))
    torch.save({"a": torch.full((2, 2), 1e5)}, tmp_path / "w.ckpt")
    with pytest.raises(UserError, match="'a' is too large for float16"):
        shorten(tmp_path / "w.ckpt", "float16")


# ---- What is not released ----


def altered(run, tmp_path):
    return shutil.copytree(run, tmp_path / "run")


def test_other_texts_than_the_test_stages(run, tmp_path):
    run = altered(run, tmp_path)
    # As if the last evaluation had been another search, which got one word wrong.
    path = run / "wer_test-a.txt"
    heard = [(u.id, u.reference, u.hypothesis) for u in read_alignments(path)]
    heard[0][2][0] = "OH"
    path.write_text(wer_text(heard))
    with pytest.raises(UserError, match=r"test stage had \d+\.\d\d, with 1 other texts"):
        build(run, "tones", tmp_path / "out", say=lambda _: None)
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_enough(run, tmp_path, monkeypatch):
    """A rounding that changes a text is found out: here one that leaves one bit.

    Heard by this process, which is quicker; the other tests have a process of its own.
    """

    def ruin(path, kind):
        weights = load_tensors(path)
        torch.save({k: w.sign() * 0.1 if w.dim() > 1 else w for k, w in weights.items()}, path)

    monkeypatch.setattr("inference.release.building.shorten", ruin)
    monkeypatch.setattr("inference.release.building.listen", heard)
    with pytest.raises(UserError, match=r"float16 weights change \d of 8 texts, .* became"):
        build(run, "tones", tmp_path / "out", dtype="float16", say=lambda _: None)
    assert not (tmp_path / "out").exists()


def call(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["release", *map(str, words)])
    with pytest.raises(SystemExit, match="2"):
        script.main()
    return capsys.readouterr().err


def test_mistakes_have_a_line(run, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    whole = altered(run, tmp_path)
    (whole / "train.csv").unlink()
    resumed = shutil.copytree(run, tmp_path / "resumed")
    text = (resumed / "hyperparams.yaml").read_text()
    assert re.search(r"^resume:", text, re.M)
    (resumed / "hyperparams.yaml").write_text(re.sub(r"(?m)^resume:", "resume: other/run", text))
    for words, message in (
        ([run], "give RUN, --name and --output"),
        ([run, "--name", "../x", "--output", out], "--name '../x' must be letters"),
        ([run / "save", "--name", "x", "--output", out], "holds no wer_<test set>.txt"),
        ([resumed, "--name", "x", "--output", out], "began with the weights of other/run"),
        ([run, "--name", "x", "--output", out, "--data_folder", tmp_path], "are not found, "),
        ([run, "--name", "x", "--output", out, "--notes", tmp_path], "cannot be read"),
        ([whole, "--name", "x", "--output", out], "train.csv is missing: without it the card"),
        ([run, "--name", "x", "--output", out, "--megabytes", "0.01"], "0.01 MB are allowed"),
        (["--check", tmp_path], "holds no SHA256SUMS"),
    ):
        assert message in call(monkeypatch, capsys, *words)
        assert not out.exists()


def test_a_package_that_ends_before_it_is_asked(tmp_path):
    paths = {str(i): f"/recordings/of/a/large/test/set/{i}.flac" for i in range(5000)}
    with pytest.raises(UserError, match="does not work by itself: ModuleNotFoundError"):
        listen(tmp_path, paths)


# ---- Training on ----


def test_training_begins_with_a_release(run, release, tmp_path):
    path = start(release / "tones.tar.gz", tmp_path / "start")
    options = {k: v for k, v in QUICK.items() if k != "number_of_epochs"}
    more = {"resume": tmp_path / "start", "skip_train": True}
    runs.train(RECIPES["ctc"], tmp_path / "same", **options, **more)
    for name in ("test-a", "test-b"):
        same = [(f / f"wer_{name}.txt").read_text() for f in (run, tmp_path / "same")]
        assert same[0] == same[1]
    del more["skip_train"]
    runs.train(RECIPES["ctc"], tmp_path / "on", **options, **more, number_of_epochs=1)
    first, again = (runs.log_lines(f)[0]["train loss"] for f in (run, tmp_path / "on"))
    assert again < 0.7 * first and path.is_dir()
    with pytest.raises(UserError, match="exists; give another folder"):
        start(release / "tones.tar.gz", tmp_path / "start")


def test_a_beginning_that_cannot_be_written_is_not_there(release, tmp_path, monkeypatch):
    saved = Checkpointer.save_checkpoint

    def full(self, *args, **kwargs):
        saved(self, *args, **kwargs)
        raise OSError("No space left on device")

    monkeypatch.setattr(Checkpointer, "save_checkpoint", full)
    with pytest.raises(OSError, match="No space left"):
        start(release / "tones.tar.gz", tmp_path / "start")
    assert not list(tmp_path.iterdir())
