"""Splits mixed in other proportions: how often an utterance comes, batches of it, resuming."""

import pickle
from collections import Counter, defaultdict

import pytest

from modules.data import train_loader_options
from modules.datasets import Copy
from modules.errors import UserError
from modules.mixing import MixedBatchSampler
from tests.recipes import runs
from tests.test_exact_resume import CTC, EVERYTHING, assert_same_end

MIX = {"train_splits": "[many, dev, few]", "train_mix": "{many: 0.5, few: 3}"}
BATCHES = {
    "dynamic": {},
    "random": {"dynamic_batching": False, "batch_size": 5},
    "ascending": {"dynamic_batching": False, "sorting": "ascending", "batch_size": 5},
}


@pytest.fixture(scope="module", autouse=True)
def linked(tmp_path_factory):
    """Splits of several corpora, linked into one folder under names of their own."""
    folder = tmp_path_factory.mktemp("linked")
    for name, split in {"many": "train", "few": "test-b", "dev": "dev", "test-a": "test-a"}.items():
        (folder / name).symlink_to(runs.corpus() / split)
    with pytest.MonkeyPatch.context() as patch:
        for key, value in {"data_folder": folder, "test_splits": "[test-a]"}.items():
            patch.setitem(MIX, key, value)
        yield


class Chunks(list):
    """Stands for a batch sampler that takes three at a time."""

    def __init__(self, chosen):
        super().__init__(list(range(i, min(i + 3, len(chosen)))) for i in range(0, len(chosen), 3))

    def set_epoch(self, epoch):
        self.epoch = epoch


def test_every_utterance_comes_as_often_as_it_should():
    sampler = MixedBatchSampler(Chunks, [3] * 10 + [0.25] * 1000 + [1.5] * 10, seed=1)
    epochs = []
    for epoch in (1, 2):
        sampler.set_epoch(epoch)
        assert sampler.batches.epoch == epoch and len(sampler) == len(list(sampler))
        counts = Counter(i for batch in sampler for i in batch)
        assert [counts[i] for i in range(10)] == [3] * 10
        assert 200 < sum(counts[i] for i in range(10, 1010)) < 300
        assert {counts[i] for i in range(10, 1010)} == {0, 1}
        assert {counts[i] for i in range(1010, 1020)} == {1, 2}
        epochs.append(list(sampler))
    assert epochs[0] != epochs[1]
    sampler.set_epoch(1)
    assert list(sampler) == epochs[0]


@pytest.mark.parametrize("kind", BATCHES)
def test_fractions_so_small_that_no_utterance_comes(kind, tmp_path):
    mixture = MIX | {"train_splits": "[few]", "train_mix": "{few: 0.000001}"}
    brain, train, _, _ = runs.build(CTC, tmp_path, **mixture, **BATCHES[kind])
    sampler = train_loader_options(vars(brain.hparams), train)["batch_sampler"]
    for epoch in (1, 2):
        sampler.set_epoch(epoch)
        assert [len(batch) for batch in sampler] == [1]


@pytest.mark.parametrize("kind", BATCHES)
def test_batches_of_a_mixture(kind, tmp_path):
    brain, train, _, _ = runs.build(CTC, tmp_path, **MIX, **BATCHES[kind])
    hparams = vars(brain.hparams)
    sampler = train_loader_options(hparams, train)["batch_sampler"]
    sampler.set_epoch(1)
    batches = [[train.data_ids[i] for i in batch] for batch in sampler]
    speakers = Counter(name.split("-")[0] for batch in batches for name in batch)
    assert speakers["2"] == 4 and speakers["4"] == 12 and 6 <= speakers["1"] <= 18
    seconds = [[float(train.data[name]["duration"]) for name in batch] for batch in batches]
    if kind == "dynamic":
        assert all(max(b) * len(b) <= hparams["max_batch_length_train"] for b in seconds)
    else:
        assert {len(batch) for batch in batches[:-1]} == {5}
    if kind == "ascending":
        together = [second for batch in seconds for second in batch]
        assert together == sorted(together)


def test_without_a_mixture_nothing_changes(tmp_path):
    brain, train, _, _ = runs.build(CTC, tmp_path, **MIX | {"train_mix": None})
    hparams = vars(brain.hparams)
    plain = train_loader_options(hparams, train)["batch_sampler"]
    once = train_loader_options(hparams | {"train_mix": {"dev": 1}}, train)["batch_sampler"]
    for epoch in (1, 2):
        plain.set_epoch(epoch)
        once.set_epoch(epoch)
        assert list(plain) == list(once)


def test_every_copy_has_a_speed_of_its_own(tmp_path):
    options = MIX | {"train_splits": "[few]", "train_mix": "{few: 9}", "speeds": "[90,100,110]"}
    brain, train, _, _ = runs.build(CTC, tmp_path, **options)
    loader = train_loader_options(vars(brain.hparams), train)
    train.set_epoch(1)
    sampler = loader["batch_sampler"]
    sampler.set_epoch(1)
    lengths = defaultdict(list)
    for batch in pickle.loads(pickle.dumps(list(sampler))):  # as workers get them
        for i in batch:
            lengths[int(i)].append(len(train[i]["sig"]))
    assert all(len(found) == 9 and len(set(found)) > 1 for found in lengths.values())
    # The first is the one that would be without the others, and all are when they are read again.
    first = [len(train[i]["sig"]) for i in range(4)]
    assert all(length in lengths[i] for i, length in enumerate(first))
    again = {i: [len(train[Copy(i, copy)]["sig"]) for copy in range(9)] for i in range(4)}
    assert {i: sorted(x) for i, x in again.items()} == {i: sorted(x) for i, x in lengths.items()}


def test_a_killed_run_of_a_mixture_goes_on_to_the_bit(tmp_path, monkeypatch):
    options = EVERYTHING | MIX | {"num_workers": 0}
    printed = runs.train(CTC, tmp_path / "straight", **options)
    many, dev, few = (
        sum(float(line.split(",")[1]) for line in csv.read_text().splitlines()[1:]) / 3600
        for csv in (tmp_path / "straight" / f"{name}.csv" for name in ("many", "dev", "few"))
    )
    assert f"{many / 2 + dev + 3 * few:.2f} h an epoch" in printed
    with monkeypatch.context() as patch, pytest.raises(runs.Killed):
        runs.die_after(patch, 9)
        runs.train(CTC, tmp_path / "killed", **options)
    runs.train(CTC, tmp_path / "killed", **options)
    assert_same_end(tmp_path / "killed", tmp_path / "straight")


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        ("{mnay: 2}", "'mnay', which is not among train_splits"),
        ("{many: 0}", "many has 0; expected a number above 0"),
        ("{many: often}", "many has 'often'"),
        ("[many]", "must say how often each split comes, as {train-clean-100: 10"),
        ("{many: 2", "is no YAML"),
    ],
)
def test_wrong_mixtures(mix, message, tmp_path):
    with pytest.raises(UserError, match=message):
        runs.build(CTC, tmp_path, **MIX | {"train_mix": mix})
    assert not list(tmp_path.glob("*.csv"))  # it is said before the preparation


def test_manifests_that_do_not_fit(tmp_path):
    brain, train, _, _ = runs.build(CTC, tmp_path, **MIX)
    hparams = vars(brain.hparams)
    (tmp_path / "few.csv").write_text("ID,duration\nstranger,1\n")
    with pytest.raises(UserError, match=r"1 utterances .* not in train_csv.*stranger"):
        train_loader_options(hparams, train)
    (tmp_path / "few.csv").unlink()
    with pytest.raises(UserError, match=r"needs the manifest .*few\.csv"):
        train_loader_options(hparams, train)
