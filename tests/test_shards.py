"""Tar shards: what is in them, an epoch's plan, and training from them as from the files."""

import csv
import random
import shutil
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pytest
import torch

import librispeech_prepare
import train_CTC
from modules.batches import WholeStepSampler, pack
from modules.corpus.shards import key_of, write_shards
from modules.data import hours, load_manifest, train_loader_options
from modules.errors import UserError
from modules.shards import ShardBatchSampler, ShardDataset, halve, shards_of
from tests.recipes import runs
from tests.test_distributed import finish, start_ranks
from tests.test_exact_resume import CTC, EVERYTHING, assert_same_end

MEGABYTES = 0.15  # 24 utterances of about 28 kB: some shards
OPTIONS = {"shard_streams": 2, "shard_window": 2, "num_buckets": 4}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """The tiny corpus' training split, written by the preparation script."""
    pytest.importorskip("webdataset", reason="pip install -r requirements-extra.txt")
    folder = tmp_path_factory.mktemp("shards")
    arguments = [runs.corpus(), folder / "manifests", "--train", "train", "--shards", folder]
    librispeech_prepare.main([*map(str, arguments), "--shard-megabytes", str(MEGABYTES)])
    return folder


def rows(path):
    with open(path, newline="") as file:
        return {row["ID"]: row for row in csv.DictReader(file)}


# ---- Writing ----


def test_shards_hold_every_file_once(shards):
    files, index = rows(shards / "manifests/train.csv"), rows(shards / "train.csv")
    assert files.keys() == index.keys() and len(files) == 24
    names = sorted(shards.glob("*.tar"))
    assert len(names) >= 4 and {row["wav"] for row in index.values()} == {p.name for p in names}
    for name, row in index.items():
        with tarfile.open(shards / row["wav"]) as tar:
            audio = tar.extractfile(f"{key_of(name)}.flac").read()
            assert audio == Path(files[name]["wav"]).read_bytes()
            assert tar.extractfile(f"{key_of(name)}.txt").read().decode() == row["wrd"]
        assert row["duration"] == files[name]["duration"]
    sizes = [path.stat().st_size for path in names]
    assert max(sizes) < 2 * min(sizes)
    assert key_of("a.b/c d") == "a%2Eb%2Fc%20d"


def test_a_stopped_writing_goes_on(shards, tmp_path):
    arguments = (shards / "manifests", "train", tmp_path, MEGABYTES)
    count = write_shards(*arguments)
    first, last = tmp_path / "train-00000.tar", tmp_path / f"train-{count - 1:05d}.tar"
    whole, when = last.read_bytes(), first.stat().st_mtime_ns
    last.unlink()
    (tmp_path / "train.csv").unlink()
    (tmp_path / f"{last.name}.partial").write_bytes(whole[:1000])
    assert write_shards(*arguments) == count
    assert last.read_bytes() == whole and first.stat().st_mtime_ns == when
    assert not list(tmp_path.glob("*.partial"))


def test_shards_of_something_else_are_left_alone(shards, tmp_path):
    with pytest.raises(UserError, match="from other data or in another size"):
        write_shards(shards / "manifests", "train", shards, 2 * MEGABYTES)
    (tmp_path / "train-00000.tar").touch()
    with pytest.raises(UserError, match=r"has train-00000\.tar of another origin"):
        write_shards(shards / "manifests", "train", tmp_path, MEGABYTES)
    (tmp_path / "train-00000.tar").rename(tmp_path / "train-100-00000.tar")  # of another split
    assert write_shards(shards / "manifests", "train", tmp_path, MEGABYTES) > 3
    with pytest.raises(UserError, match="shard-megabytes=0"):
        write_shards(shards / "manifests", "train", tmp_path, 0)


def test_missing_library(shards, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(UserError, match="pip install webdataset"):
        write_shards(shards / "manifests", "train", tmp_path, MEGABYTES)
    with pytest.raises(UserError, match="pip install webdataset"):
        runs.build(CTC, tmp_path / "run", train_shards=shards)


# ---- The plan of an epoch ----

LENGTHS = [1 + i % 7 for i in range(1000)]
SHARDS = [list(range(i, i + 40)) for i in range(0, 1000, 40)]


def cut(chosen, rng):
    batches = pack(sorted(chosen, key=LENGTHS.__getitem__), LENGTHS, seconds=60)
    rng.shuffle(batches)
    return batches


def plan(streams=4, window=3, times=None, step=1, epoch=1):
    times = times or [1] * len(SHARDS)
    sampler = ShardBatchSampler(SHARDS, cut, times, streams, window, seed=3, step=step)
    sampler.set_epoch(epoch)
    return sampler


@pytest.mark.parametrize("streams", [1, 4, 8])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_ranks_share_an_epoch_without_loss_or_repetition(streams, ranks, accumulation):
    if streams % ranks:
        return
    shares = []
    for rank in range(ranks):
        sampler = WholeStepSampler(
            plan(streams, step=ranks * accumulation), accumulation, rank, ranks
        )
        sampler.set_epoch(2)
        shares.append(list(sampler))
        assert len(sampler) == len(shares[-1])
    assert len({len(share) for share in shares}) == 1 and len(shares[0]) % accumulation == 0
    seen = [i for share in shares for batch in share for i in batch]
    assert sorted(seen) == list(range(1000))
    # Each stream is read by one process, shard by shard.
    readers = Counter(
        shard for share in shares for shard in {i // 40 for batch in share for i in batch}
    )
    assert set(readers.values()) == {1}


def test_epochs_differ_and_come_again():
    first, second, again = (list(plan(epoch=epoch)) for epoch in (1, 2, 1))
    assert first == again != second
    assert {tuple(sorted(batch)) for batch in first} != {tuple(sorted(batch)) for batch in second}
    assert all(max(LENGTHS[i] for i in batch) * len(batch) <= 60 for batch in first)


def test_only_a_window_of_shards_is_open():
    for number in range(4):
        opened = [{i // 40 for i in batch} for batch in list(plan(window=3))[number::4]]
        for shard in set().union(*opened):
            (first, *_, last) = [i for i, shards in enumerate(opened) if shard in shards]
            assert len(set().union(*opened[first : last + 1])) <= 3


def test_shards_come_as_often_as_they_should():
    counts = Counter(i for batch in plan(times=[3] * 5 + [0.5] * 20) for i in batch)
    assert [counts[i] for i in range(200)] == [3] * 200
    assert 4 * 40 <= sum(counts[i] for i in range(200, 1000)) <= 16 * 40


def test_no_stream_is_left_without_a_shard():
    """However small the fractions: the next likely ones come."""
    for times in ([0.05] * 25, [2] + [0.1] * 24):
        for epoch in range(20):
            sampler = plan(streams=8, times=times, epoch=epoch)
            assert len({i // 40 for batch in sampler for i in batch}) >= (8 if times[0] < 1 else 7)
            assert len(sampler) % 8 == 0 and all(sampler)


def test_halving():
    assert halve([[1, 2, 3, 4], [5], [6, 7]], 5) == [[1], [2], [3, 4], [5], [6, 7]]
    parts = halve([[1, 2, 3, 4], [5], [6, 7]], 6)
    assert [i for part in parts for i in part] == list(range(1, 8)) and len(parts) == 6
    with pytest.raises(UserError, match="too few utterances for 8 batches"):
        halve([[1, 2, 3, 4], [5], [6, 7]], 8)
    with pytest.raises(UserError, match="25 shards are too few for shard_streams=30"):
        plan(streams=30)


# ---- Training ----


def test_every_shard_is_read_once_an_epoch(shards, tmp_path, monkeypatch):
    opened, read = [], ShardDataset.read
    monkeypatch.setattr(
        ShardDataset, "read", lambda self, shard: opened.append(shard) or read(self, shard)
    )
    brain, train, _, _ = runs.build(CTC, tmp_path, train_shards=shards, **OPTIONS)
    loader = torch.utils.data.DataLoader(train, **train_loader_options(vars(brain.hparams), train))
    seen = [name for batch in loader for name in batch.id]
    assert sorted(seen) == sorted(train.data_ids)
    assert sorted(opened) == sorted(path.name for path in shards.glob("*.tar"))
    assert (tmp_path / "dev.csv").exists() and not (tmp_path / "train.csv").exists()


@pytest.fixture(scope="module")
def straight(shards, tmp_path_factory):
    """A run from shards that nothing happens to, with two workers."""
    folder = tmp_path_factory.mktemp("straight")
    runs.train(CTC, folder, train_shards=shards, **EVERYTHING | OPTIONS)
    return folder


def test_files_give_the_same_weights_to_the_bit(shards, straight, tmp_path, monkeypatch):
    """The same batches, whose audio is read from the corpus; no workers."""
    files = rows(shards / "manifests/train.csv")
    monkeypatch.setattr(ShardDataset, "audio", lambda _, name: files[name]["wav"])
    runs.train(CTC, tmp_path, train_shards=shards, **EVERYTHING | OPTIONS | {"num_workers": 0})
    assert_same_end(tmp_path, straight)


@pytest.mark.parametrize("gone", [False, True])
def test_an_evaluation_does_not_ask_for_shards(shards, straight, tmp_path, monkeypatch, gone):
    """Nor for WebDataset, nor for the splits as files; where the manifest is, it has the hours."""
    monkeypatch.setitem(sys.modules, "webdataset", None)
    for split in ("dev", "test-a"):
        shutil.copytree(runs.corpus() / split, tmp_path / "data" / split)
    run, options = shutil.copytree(straight, tmp_path / "run"), runs.PLAIN | {"skip_train": True}
    options |= {"data_folder": tmp_path / "data", "test_splits": "[test-a]"}
    if gone:
        yaml = run / "hyperparams.yaml"
        yaml.write_text(yaml.read_text().replace(str(shards), "/gone"))
    manifest = load_manifest(shards / "train.csv", {"data_folder": shards})
    told = "unknown hours" if gone else f"{hours(manifest):.2f} h"
    before = (run / "hyperparams.yaml").read_bytes()
    named = {"train_shards": "/gone" if gone else shards, "train_mix": "{train: 1}"}
    for folder, more in (
        (run, {}),
        (run, named),
        (tmp_path / "new", {"resume": run}),
        (tmp_path / "new", {"resume": run / "save"}),
    ):
        printed = runs.train(CTC, folder, **options | more)
        assert f"training     {told} an epoch" in printed and "\ntest-a " in printed
    del options["skip_train"]
    argv = [*runs.arguments(CTC, run, **options), "--test_only"]
    with runs.own_logging():
        train_CTC.main(argv)
    assert (run / "hyperparams.yaml").read_bytes() == before
    assert not (run / "train.csv").exists()


def test_the_first_training_says_what_was_learnt_from(tmp_path):
    """Not the one that it was itself started from."""
    for name, text in (
        ("first", "train_shards: /shards\nskip_train: false\n"),
        ("then", "train_shards: # files\nskip_train: false\n"),
        ("evaluated", "train_shards:\nskip_train: true\n"),
        ("older", "data_folder: /data\n"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "hyperparams.yaml").write_text(text)
    hparams = {"train_shards": None, "skip_train": True}
    for output, resume, expected in (
        ("first", None, "/shards"),
        ("then", "first", None),
        ("older", "first", None),
        ("evaluated", "first/save/CKPT+1", "/shards"),
        ("new", "first/save", "/shards"),
        ("new", "then", None),
        ("new", None, None),
    ):
        places = {"output_folder": tmp_path / output, "resume": resume and tmp_path / resume}
        assert shards_of(hparams | places) == expected
    assert shards_of(hparams | places | {"skip_train": False}) is None


def test_a_killed_run_goes_on_to_the_bit(shards, straight, tmp_path, monkeypatch):
    options = EVERYTHING | OPTIONS | {"train_shards": shards, "num_workers": 1}
    with monkeypatch.context() as patch, pytest.raises(runs.Killed):
        runs.die_after(patch, random.randint(4, 9))
        runs.train(CTC, tmp_path, **options)
    runs.train(CTC, tmp_path, **options)
    assert_same_end(tmp_path, straight)


@pytest.mark.slow
def test_two_processes_equal_one(shards, tmp_path):
    options = runs.PLAIN | OPTIONS | {"train_shards": shards, "number_of_epochs": 2}
    runs.train(CTC, tmp_path / "one", grad_accumulation_factor=2, **options)
    command = runs.command(CTC, tmp_path / "two", **options)
    status, output = finish(start_ranks(command[1:], "--standalone", "--nproc-per-node", 2))
    assert status == 0, output
    one, two = runs.log_lines(tmp_path / "one"), runs.log_lines(tmp_path / "two")
    assert [line["steps"] for line in one] == [line["steps"] for line in two]
    for a, b in zip(one, two, strict=True):
        assert a["train loss"] == pytest.approx(b["train loss"], rel=5e-3)


def test_broken_shards_cost_their_utterances(shards, tmp_path):
    broken = tmp_path / "shards"
    broken.mkdir()
    for path in shards.glob("train*"):
        (broken / path.name).write_bytes(path.read_bytes())
    (broken / "train-00000.tar").unlink()
    cut_short = (broken / "train-00001.tar").read_bytes()
    (broken / "train-00001.tar").write_bytes(cut_short[: len(cut_short) // 2])
    index = rows(broken / "train.csv")
    lost = sum(row["wav"] == "train-00000.tar" for row in index.values())
    runs.train(CTC, tmp_path / "run", train_shards=broken, number_of_epochs=1, **OPTIONS)
    (line,) = runs.log_lines(tmp_path / "run")
    assert lost < line["train unread files"] < len(index)
    log = (tmp_path / "run/log.txt").read_text()
    assert "train-00000.tar: it cannot be read" in log and "train-00001.tar" in log


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_splits": "[elsewhere]"}, r"no manifest .*elsewhere\.csv; write it with"),
        ({"dynamic_batching": False, "sorting": "ascending"}, "sorting='ascending' is not for"),
        ({"shard_streams": 50}, "are too few for shard_streams=50"),
        ({"shard_window": 0}, "shard_window=0 must be positive"),
    ],
)
def test_wrong_options(shards, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        runs.train(CTC, tmp_path, train_shards=shards, **OPTIONS | options)


def test_mixed_shards(shards, tmp_path):
    mix = {"train_mix": "{train: 2}"}
    brain, train, _, _ = runs.build(CTC, tmp_path, train_shards=shards, **OPTIONS | mix)
    sampler = train_loader_options(vars(brain.hparams), train)["batch_sampler"]
    counts = Counter(i for batch in sampler for i in batch)
    assert set(counts.values()) == {2} and len(counts) == 24
