"""Preparation of manifests: what is written, every fault, and what a killed run leaves behind."""

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from librispeech_prepare import main, prepare_librispeech
from modules.errors import UserError

ROOT = Path(__file__).parents[1]
CORPUS = Path(os.environ.get("MAMBA_ASR_CORPUS", ROOT.parent / "shared" / "corpus"))


def tone(path, seconds=0.5, rate=16000, channels=1):
    path.parent.mkdir(parents=True, exist_ok=True)
    wave = 0.1 * np.sin(np.arange(int(seconds * rate)) / 10)
    sf.write(path, np.tile(wave[:, None], (1, channels)), rate)


def chapter(split, speaker, texts, suffix=".flac"):
    """Write one chapter: texts[i] belongs to utterance i. Returns its folder."""
    folder = split / str(speaker) / "1"
    lines = []
    for index, text in enumerate(texts):
        tone(folder / f"{speaker}-1-{index:04d}{suffix}")
        lines.append(f"{speaker}-1-{index:04d} {text}\n")
    (folder / f"{speaker}-1.trans.txt").write_text("".join(lines))
    return folder


@pytest.fixture
def corpus(tmp_path):
    data = tmp_path / "data"
    chapter(data / "train-clean-100", 19, ["ONE TWO", "IT'S THREE"])
    chapter(data / "train-clean-100", 26, ["FOUR"], suffix=".wav")
    chapter(data / "train-other", 27, ["SIX"])
    chapter(data / "dev-clean", 32, ["FIVE"])
    return data


def rows(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def ids(path):
    return [row["ID"] for row in rows(path)]


def report(save):
    return (save / "prepare_report.txt").read_text()


def test_manifests_and_merge(corpus, tmp_path):
    save = tmp_path / "save"
    splits = ["train-clean-100", "train-other"]
    prepare_librispeech(corpus, save, splits, ["dev-clean"], [], None, splits, "train.csv")
    first = rows(save / "train-clean-100.csv")[0]
    assert first == {
        "ID": "19-1-0000",
        "duration": "0.5",
        "wav": str(corpus / "train-clean-100/19/1/19-1-0000.flac"),
        "spk_id": "19-1",
        "wrd": "ONE TWO",
    }
    assert ids(save / "train.csv") == ["19-1-0000", "19-1-0001", "26-1-0000", "27-1-0000"]
    assert ids(save / "dev-clean.csv") == ["32-1-0000"]
    assert not list(save.glob(".*.partial"))


def test_speechbrain_reads_the_manifest(corpus, tmp_path):
    from speechbrain.dataio.dataset import DynamicItemDataset

    prepare_librispeech(corpus, tmp_path / "save", ["train-clean-100"])
    data = DynamicItemDataset.from_csv(tmp_path / "save" / "train-clean-100.csv")
    assert len(data) == 3
    assert data.data["19-1-0001"]["duration"] == 0.5


@pytest.mark.parametrize(("wanted", "expected"), [(1, (1, 1)), ([2, None], (2, 1)), (9, (3, 1))])
def test_select_n_sentences(corpus, tmp_path, wanted, expected):
    prepare_librispeech(corpus, tmp_path, ["train-clean-100"], ["dev-clean"], [], wanted)
    found = len(ids(tmp_path / "train-clean-100.csv")), len(ids(tmp_path / "dev-clean.csv"))
    assert found == expected


def test_select_n_sentences_replaces_unusable_ones(corpus, tmp_path):
    (corpus / "train-clean-100/19/1/19-1-0000.flac").write_bytes(b"no audio")
    prepare_librispeech(corpus, tmp_path, "train-clean-100", [], [], 2, max_bad_fraction=0.5)
    assert ids(tmp_path / "train-clean-100.csv") == ["19-1-0001", "26-1-0000"]


def test_few_sentences_of_a_large_split_are_not_refused_for_its_rare_faults(tmp_path):
    chapter(tmp_path / "data/train", 19, ["ONE"] * 29 + [""])
    prepare_librispeech(tmp_path / "data", tmp_path, "train", [], [], 2)  # 1 of 30, not 1 of 3
    assert "1 left out (3.3 %)" in report(tmp_path) and "empty text: 1" in report(tmp_path)


def test_skip_prep_does_nothing(tmp_path):
    prepare_librispeech("/nowhere", tmp_path / "save", ["a"], [], [], None, [], None, True)
    assert not (tmp_path / "save").exists()


# Faults of single files: each breaks one of three utterances, is counted, and is listed.


def unreadable(folder):
    (folder / "19-1-0000.flac").write_bytes(b"this is no audio")


def cut_off(folder):
    path = folder / "19-1-0000.flac"
    rng = np.random.default_rng(0)
    sf.write(path, 0.5 * rng.standard_normal(32000), 16000)
    path.write_bytes(path.read_bytes()[:20000])


def no_samples(folder):
    sf.write(folder / "19-1-0000.wav", np.zeros(0), 16000)
    (folder / "19-1-0000.flac").unlink()


def no_bytes(folder):
    (folder / "19-1-0000.flac").write_bytes(b"")


def edit(change):
    def break_it(folder):
        path = folder / "19-1.trans.txt"
        path.write_bytes(change(path.read_bytes()))

    return break_it


FAULTS = [
    (unreadable, "unreadable audio: 1", "19-1-0000.flac"),
    (cut_off, "unreadable audio: 1", "19-1-0000.flac"),
    (no_bytes, "unreadable audio: 1", "19-1-0000.flac"),
    (no_samples, "audio with 0 samples: 1", "19-1-0000.wav"),
    (lambda f: tone(f / "19-1-0000.flac", 61, 16000), "audio too long: 1", "61.0 s"),
    (lambda f: tone(f / "19-1-0000.flac", 0.01), "audio too short: 1", "0.010 s"),
    (lambda f: tone(f / "19-1-0000.flac", 1, 8000), "wrong sample rate: 1", "8000 Hz"),
    (lambda f: tone(f / "19-1-0000.flac", 1, 16000, 2), "more than one channel: 1", "2 channel"),
    (lambda f: (f / "19-1.trans.txt").unlink(), "missing transcript file: 2", "19-1-0000.flac"),
    (edit(lambda b: b.split(b"\n", 1)[1]), "audio without text: 1", "19-1-0000.flac"),
    (lambda f: (f / "19-1-0000.flac").unlink(), "text without audio: 1", "19-1.trans.txt:1"),
    (edit(lambda b: b.replace(b"ONE TWO", b" ")), "empty text: 1", "19-1-0000.flac"),
    (edit(lambda b: b.replace(b"ONE", b"ON\xc9")), "transcript not UTF-8: 1", "19-1.trans.txt:1"),
    (edit(lambda b: b + b"19-1-0000 OTHER"), "duplicate id: 1", "19-1.trans.txt:3"),
    (lambda f: tone(f / "19-1-0000.wav"), "duplicate id: 2", "19-1-0000.wav"),
    (edit(lambda b: b.replace(b"ONE", b"$ONE")), "unexpected characters: 1", "variable"),
]


@pytest.mark.parametrize(("break_it", "count", "place"), FAULTS)
def test_faults_are_reported(corpus, tmp_path, caplog, break_it, count, place):
    break_it(corpus / "train-clean-100/19/1")
    save = tmp_path / "save"
    with pytest.raises(UserError, match="No manifest was written") as error:
        prepare_librispeech(corpus, save, ["train-clean-100"])
    assert count in str(error.value) and place in str(error.value)
    assert count in report(save) and place in report(save)
    assert not list(save.glob("*.csv"))

    prepare_librispeech(corpus, save, ["train-clean-100"], max_bad_fraction=0.7)
    kept = ids(save / "train-clean-100.csv")
    assert "26-1-0000" in kept and "19-1-0000" not in kept
    assert count in caplog.text and place in caplog.text
    caplog.clear()
    prepare_librispeech(corpus, save, ["train-clean-100"], max_bad_fraction=0.7)
    assert "left out" in caplog.text  # a run that is skipped says so too


def test_allowed_characters(corpus, tmp_path):
    with pytest.raises(UserError, match="unexpected characters: 1"):
        prepare_librispeech(corpus, tmp_path, "train-clean-100", allowed_characters="ONETWHRFU")
    prepare_librispeech(corpus, tmp_path, "train-clean-100", allowed_characters="ONETWHRFUIS'")


def test_sample_rate_and_length_are_options(corpus, tmp_path):
    tone(corpus / "dev-clean/32/1/32-1-0000.flac", 61, 8000)
    prepare_librispeech(corpus, tmp_path, "dev-clean", sample_rate=8000, max_seconds=None)
    assert rows(tmp_path / "dev-clean.csv")[0]["duration"] == "61.0"


def test_split_and_folder_faults(corpus, tmp_path):
    def prepare(data=corpus, splits=("dev-clean",), **options):
        prepare_librispeech(data, tmp_path / "save", splits, **options)

    with pytest.raises(UserError, match=r"data_folder=.*nowhere is not an existing folder"):
        prepare("/nowhere")
    with pytest.raises(UserError, match="did you mean 'train-clean-100'"):
        prepare(splits=["train-clean"])
    corpus.rename(tmp_path / "LibriSpeech")
    with pytest.raises(UserError, match="LibriSpeech has it"):
        prepare(tmp_path)
    corpus = tmp_path / "LibriSpeech"
    (corpus / "empty").mkdir()
    with pytest.raises(UserError, match="the split is empty"):
        prepare(corpus, ["empty"])
    with pytest.raises(UserError, match="no split was named"):
        prepare(corpus, [])
    with pytest.raises(UserError, match="merge_name"):
        prepare(corpus, merge_lst=["dev-clean"])
    with pytest.raises(UserError, match="not among the splits"):
        prepare(corpus, merge_lst=["other"], merge_name="train.csv")
    with pytest.raises(UserError, match="2 entries for 1"):
        prepare(corpus, select_n_sentences=[1, 2])
    with pytest.raises(UserError, match="above 0"):
        prepare(corpus, select_n_sentences=0)
    with pytest.raises(UserError, match="plain name"):
        prepare(corpus, ["../dev-clean"])
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be made"):
        prepare_librispeech(corpus, tmp_path / "file", ["dev-clean"])


def test_overlap_of_train_and_test_is_noted(corpus, tmp_path, caplog):
    chapter(corpus / "test-clean", 19, ["SEVEN"])
    prepare_librispeech(corpus, tmp_path, ["train-clean-100"], [], ["test-clean"])
    assert "1 speakers of 1 are also in train-clean-100: 19" in caplog.text


def test_merged_ids_must_differ(corpus, tmp_path):
    chapter(corpus / "again", 27, ["SIX"])
    with pytest.raises(UserError, match="more than one of the merged splits"):
        prepare_librispeech(
            corpus,
            tmp_path,
            ["again", "train-other"],
            [],
            [],
            None,
            ["again", "train-other"],
            "t.csv",
        )


# Idempotence, and killed runs.


def test_second_run_is_skipped_until_something_changes(corpus, tmp_path):
    def written():
        before = (
            (tmp_path / "dev-clean.csv").stat().st_mtime_ns if any(tmp_path.glob("*.csv")) else 0
        )
        prepare_librispeech(corpus, tmp_path, ["train-clean-100"], ["dev-clean"], **options)
        return (tmp_path / "dev-clean.csv").stat().st_mtime_ns != before

    options = {}
    assert written()
    assert not written()
    options = {"select_n_sentences": 1}
    assert written() and not written()
    chapter(corpus / "dev-clean", 33, ["NINE"])
    assert written() and not written()
    tone(corpus / "dev-clean/33/1/33-1-0000.flac", 0.7)
    assert written() and not written()
    (tmp_path / "dev-clean.csv").write_text("edited by hand")
    assert written() and not written()
    (tmp_path / "train-clean-100.csv").unlink()
    assert written() and not written()


KILLED = """
import os, signal, sys
import modules.corpus.store as store
from librispeech_prepare import prepare_librispeech
name, left, data, save = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
real = getattr(os, name)
def deadly(*args):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)
setattr(os, name, deadly)
splits = ["train-clean-100", "train-other"]
prepare_librispeech(data, save, splits, ["dev-clean"], [], None, splits, "train.csv")
"""


@pytest.mark.parametrize(
    ("call", "count"), [("fsync", 1), ("fsync", 4), ("replace", 3), ("replace", 5)]
)
def test_killed_run_leaves_no_half_file(corpus, tmp_path, call, count):
    save = tmp_path / "save"
    command = [sys.executable, "-c", KILLED, call, str(count), str(corpus), str(save)]
    killed = subprocess.run(command, cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL
    sizes = {"train": 4, "train-clean-100": 3, "train-other": 1, "dev-clean": 1}
    for path in save.glob("*.csv"):
        assert len(ids(path)) == sizes[path.stem]
    assert not (save / "prepare_state.json").exists()

    command[4] = "1000"
    subprocess.run(command, cwd=ROOT, check=True)
    assert {path.stem: len(ids(path)) for path in save.glob("*.csv")} == sizes
    assert not list(save.glob(".*.partial"))


def test_command_line(corpus, tmp_path, capsys):
    main([str(corpus), str(tmp_path / "s"), "--train", "train-other", "--merge", "train.csv"])
    assert ids(tmp_path / "s/train.csv") == ["27-1-0000"]
    with pytest.raises(SystemExit) as end:
        main([str(corpus), str(tmp_path / "s"), "--train", "train-oter"])
    assert end.value.code == 2
    assert "did you mean 'train-other'" in capsys.readouterr().err


@pytest.mark.corpus
@pytest.mark.parametrize(("name", "train", "test"), [("LibriSpeech", 407, 28), ("digits", 406, 65)])
def test_real_corpus(tmp_path, name, train, test):
    data = CORPUS / name
    if not data.is_dir():
        pytest.skip(f"no {data}; set MAMBA_ASR_CORPUS to the corpus folder")
    prepare_librispeech(data, tmp_path, "train-clean-100", "dev-clean", "test-clean")
    assert len(ids(tmp_path / "train-clean-100.csv")) == train
    assert len(ids(tmp_path / "test-clean.csv")) == test
    assert "0 left out" in report(tmp_path)
