"""Workers that live on, and audio in memory: what the loader gives is the same without them."""

import shutil

import pytest
import torch
from speechbrain.dataio.dataloader import SaveableDataLoader

from modules.data import keep_audio, train_loader_options
from modules.errors import UserError
from modules.waveforms import KeptAudio, Unread
from modules.workers import end_workers
from tests.recipes import runs

CTC = "CTC/conmamba_tiny.yaml"


def epochs_of(folder, epochs=3, keep=False, **options):
    """[{id: samples} of an epoch], ids of workers that read."""
    brain, train, *_ = runs.build(CTC, folder, **options)
    if keep:
        keep_audio(train)
        assert len(train.audio_files.kept) == 24
    loader = SaveableDataLoader(train, **train_loader_options(vars(brain.hparams), train))
    found, workers = [], set()
    for epoch in range(1, epochs + 1):
        train.set_epoch(epoch)
        loader.batch_sampler.set_epoch(epoch)
        found.append({})
        for batch in loader:
            samples = (batch.sig.lengths * batch.sig.data.shape[1]).round().long()
            for i, name in enumerate(batch.id):
                found[-1][name] = batch.sig.data[i, : samples[i]].clone()
            batch.sig.data.zero_()  # as augmentation may write into it
        if loader._iterator is not None:
            workers |= {worker.pid for worker in loader._iterator._workers}
    end_workers(loader)
    return found, workers


def test_every_way_of_loading_gives_the_same(tmp_path):
    plain, _ = epochs_of(tmp_path, num_workers=0)
    for options in ({"num_workers": 2}, {"num_workers": 2, "keep": True}, {"keep": True}):
        found, workers = epochs_of(tmp_path, **options)
        assert len(workers) == options.get("num_workers", 0)
        for epoch, expected in zip(found, plain, strict=True):
            assert epoch.keys() == expected.keys() and len(epoch) == 24
            assert all(torch.equal(epoch[name], expected[name]) for name in expected)
    speeds = [[len(epoch[name]) for name in sorted(epoch)] for epoch in plain]
    assert speeds[0] != speeds[1] != speeds[2]


def test_only_whole_datasets_are_kept_and_only_in_training(tmp_path):
    _, train, valid, tests = runs.build(CTC, tmp_path, audio_cache_mb=1)  # training has 2.7
    keep_audio(train, valid)
    assert (
        len(valid.audio_files.kept) == 4
        and tests["test-a"].audio_files.kept is valid.audio_files.kept
    )
    assert {row["wav"] for row in valid.data.values()} == valid.audio_files.kept.keys()


def test_a_file_that_cannot_be_read_is_read_again(tmp_path):
    audio, path = KeptAudio(runs.RATE, 10), tmp_path / "a.flac"
    audio.keep([(str(path), 0.5)])
    assert isinstance(audio.read(str(path), 0.5), Unread)
    runs.sf.write(path, torch.zeros(8000).numpy(), runs.RATE)
    assert len(audio.read(str(path), 0.5)) == 8000


def test_dev_splits_with_the_same_ids(tmp_path):
    data = shutil.copytree(runs.corpus(), tmp_path / "data")
    shutil.copytree(data / "dev", data / "more")
    options = {"data_folder": data, "dev_splits": "[dev, more]"}
    with pytest.raises(UserError, match=r"^4 ids of more are in .* dev_splits too, .* 2-1-0000"):
        runs.build("CTC/conmamba_tiny.yaml", tmp_path / "run", **options)
