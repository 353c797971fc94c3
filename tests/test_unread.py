"""Files that turn bad after preparation cost themselves, not the run."""

import logging
import math
import re
import shutil

import numpy as np
import pytest
import soundfile as sf

from modules.data import eval_loader_options
from modules.errors import UserError
from modules.waveforms import Unread, read_audio
from tests.recipes import runs
from tests.test_distributed import finish, start_ranks
from tests.test_numbers import prepared

CTC = "CTC/conmamba_tiny.yaml"


def cut(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def corrupt(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 100] = bytes(100)
    path.write_bytes(data)


def shorter(path):
    x, rate = sf.read(path)
    sf.write(path, x[: len(x) // 2], rate)


FAULTS = {
    "gone": lambda p: p.unlink(),
    "cut": cut,
    "corrupt": corrupt,
    "no audio": lambda p: p.write_bytes(b"sorry" * 100),
    "empty": lambda p: p.write_bytes(b""),
    "other": shorter,
    "slow": lambda p: sf.write(p, np.full(16000, 0.1), 8000),
    "stereo": lambda p: sf.write(p, np.full((32000, 2), 0.1), 16000),
}


@pytest.mark.parametrize("suffix", [".flac", ".wav", ".mp3"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_is_not_as_prepared(suffix, fault, tmp_path):
    path = tmp_path / f"a{suffix}"
    rng = np.random.default_rng(0)
    sf.write(path, 0.1 * rng.standard_normal(32000), 16000)
    assert len(read_audio(path, 16000, 2.0)) == 32000
    if fault == "corrupt" and suffix != ".flac":
        return  # other kinds have no checksums
    FAULTS[fault](path)
    found = read_audio(path, 16000, 2.0)
    assert isinstance(found, Unread)
    assert str(path) in found.why
    assert found.samples == 32000


@pytest.fixture
def data(tmp_path):
    return shutil.copytree(runs.corpus(), tmp_path / "data")


def audio(data, number, split="train/1/1/1"):
    return data / f"{split}-1-{number:04d}.flac"


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_files_cost_themselves(workers, data, tmp_path, caplog):
    options = {"data_folder": data, "number_of_epochs": 2, "num_workers": workers}
    brain, train, valid, tests = runs.build(CTC, tmp_path / "run", **options)
    audio(data, 3).unlink()
    cut(audio(data, 7))
    corrupt(data / "dev/2/1/2-1-0001.flac")
    shorter(data / "test-a/3/1/3-1-0002.flac")
    seen, whole = [], brain.compute_forward
    brain.compute_forward = lambda batch, stage: (seen.extend(batch.id), whole(batch, stage))[1]
    with caplog.at_level(logging.WARNING):
        runs.fit(brain, train, valid)
        hparams = vars(brain.hparams)
        brain.prepare_test()
        results = brain.test(tests, lambda dataset: eval_loader_options(hparams, dataset))
    for epoch in runs.log_lines(tmp_path / "run"):
        assert epoch["train unread files"] == 2
        assert epoch["valid unread files"] == 1
        assert math.isfinite(epoch["train loss"])
        assert math.isfinite(epoch["valid loss"])
        assert "train skipped batches" not in epoch
    told = re.findall(r"(\S+) cannot be read and is left out: (\S+):", caplog.text)
    train_paths = [("1-1-0003", str(audio(data, 3))), ("1-1-0007", str(audio(data, 7)))]
    assert sorted(told[:2]) == train_paths
    assert told[-1] == ("3-1-0002", str(data / "test-a/3/1/3-1-0002.flac"))
    assert len(told) == 2 * 3 + 1
    assert not {"1-1-0003", "1-1-0007", "2-1-0001", "3-1-0002"} & set(seen)
    assert seen.count("1-1-0004") == 2
    assert results["test-a"]["unread files"] == 1
    assert "unread files" not in results["test-b"]
    assert len(brain.wer.ids) == 4  # of test-b, the last


def test_a_batch_of_which_nothing_is_left(data, tmp_path):
    """In training no step is taken on it; in validation and test it does not count."""
    options = {"dynamic_batching": False, "batch_size": 1, "number_of_epochs": 1}
    options |= {"test_batch_size": 1, "max_batch_length_val": 0.1, "max_bad_fraction": 0}
    runs.train(CTC, tmp_path / "run", data_folder=data, **options)
    (whole,) = runs.log_lines(tmp_path / "run")
    for path in (
        audio(data, 3),
        *(data / f"{s}-1-0001.flac" for s in ("dev/2/1/2", "test-a/3/1/3")),
    ):
        path.unlink()
    shutil.copytree(tmp_path / "run", tmp_path / "again", ignore=lambda *_: ["save"])
    (tmp_path / "again/train_log.txt").unlink()
    printed = runs.train(CTC, tmp_path / "again", data_folder=data, skip_prep=True, **options)
    (line,) = runs.log_lines(tmp_path / "again")
    assert line["train unread files"] == line["valid unread files"] == 1
    assert line["train skipped batches"] == 1
    assert line["steps"] == whole["steps"] - 1
    assert math.isfinite(line["train loss"] + line["valid loss"])
    assert "without 1 files that cannot be read" in printed
    scored = (tmp_path / "again/wer_test-a.txt").read_text()
    assert len(re.findall(r"^3-1-\d+, %WER ", scored, re.M)) == 3
    log = (tmp_path / "again/log.txt").read_text()
    assert re.search(r"not finite; the step is skipped, .*: 1-1-0003\n", log)


def test_nothing_of_a_set_can_be_read(data, tmp_path):
    """It is told, of validation with the epoch saved: the same command goes on with it."""
    options = {"number_of_epochs": 1, "test_splits": "[test-a]"}
    options |= prepared(data, tmp_path / "run")
    audio(data, 3).unlink()
    for split in ("dev", "test-a"):
        (data / split).rename(data / f"{split}-away")
    with pytest.raises(UserError, match="no file of dev_splits can be read"):
        runs.train(CTC, tmp_path / "run", **options)
    assert not (tmp_path / "run/train_log.txt").exists()
    (data / "dev-away").rename(data / "dev")
    with pytest.raises(UserError, match="no file of the test set test-a can be read"):
        runs.train(CTC, tmp_path / "run", **options)
    (epoch,) = runs.log_lines(tmp_path / "run")
    assert epoch["train unread files"] == 1 and "valid unread files" not in epoch
    assert epoch["valid CER"] > 0


@pytest.mark.slow
def test_two_processes_of_which_one_meets_it(data, tmp_path):
    options = prepared(data, tmp_path / "run") | {"number_of_epochs": 1, "test_splits": "[test-a]"}
    for number in (3, 7, 11):
        audio(data, number).unlink()
    # Statistics of the features that both measure together would be spoilt for both.
    options |= {"normalize": "{norm_type: sentence}"}
    options |= {"dynamic_batching": False, "batch_size": 1, "sorting": "ascending"}
    command = runs.command(CTC, tmp_path / "run", **options)
    status, output = finish(start_ranks(command[1:], "--standalone", "--nproc-per-node", 2), 180)
    assert status == 0, output
    (epoch,) = runs.log_lines(tmp_path / "run")
    assert epoch["train unread files"] == epoch["train skipped batches"] == 3
    assert math.isfinite(epoch["train loss"])
    log = (tmp_path / "run/log.txt").read_text()
    assert set(re.findall(r"(\S+) cannot be read", log)) == {"1-1-0003", "1-1-0007", "1-1-0011"}
