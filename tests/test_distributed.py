"""Several processes on the CPU: the same losses as one, on one node and on two."""

import os
import re
import socket
import subprocess
import time
from collections import Counter

import pytest
import torch
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.dataio.sampler import DynamicBatchSampler

from modules.batches import WholeStepSampler
from tests.recipes import runs

CTC = "CTC/conmamba_tiny.yaml"
PYTHONPATH = [path for path in [os.environ.get("PYTHONPATH")] if path]
S2S = "S2S/conmambamamba_tiny.yaml"


def start_ranks(script_and_options, *launcher):
    return subprocess.Popen(
        [*runs.torchrun(*launcher), *script_and_options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=runs.ROOT,
        env=runs.environment(PYTHONPATH=os.pathsep.join([str(runs.ROOT), *PYTHONPATH])),
    )


def finish(process, timeout=150):
    """Wait for it: (status, output)."""
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, output


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def assert_same_curve(folder, reference):
    ours, theirs = runs.log_lines(folder), runs.log_lines(reference)
    assert len(ours) == len(theirs) == 2
    for a, b in zip(ours, theirs, strict=True):
        assert (a["steps"], a["lr"]) == (b["steps"], b["lr"])
        # The log has three digits.
        assert a["train loss"] == pytest.approx(b["train loss"], rel=5e-3)
        assert a["valid loss"] == pytest.approx(b["valid loss"], rel=5e-3)
    for split in ("test-a", "test-b"):
        ours, theirs = (
            re.search(r"%WER (\S+)", (f / f"wer_{split}.txt").read_text())[1]
            for f in (folder, reference)
        )
        assert float(ours) == pytest.approx(float(theirs), abs=10)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """One process that accumulates two batches a step; the number of batches is odd."""
    folder = tmp_path_factory.mktemp("one")
    options = {**runs.PLAIN, "number_of_epochs": 2}
    runs.train(CTC, folder, grad_accumulation_factor=2, **options)
    assert runs.log_lines(folder)[0]["steps"] == 3  # of 5 batches
    return folder, options


def test_two_processes_equal_one(one_process, tmp_path):
    reference, options = one_process
    command = runs.command(CTC, tmp_path, **options)
    status, output = finish(start_ranks(command[1:], "--standalone", "--nproc-per-node", 2))
    assert status == 0, output
    assert_same_curve(tmp_path, reference)
    # One rank tells.
    assert output.count("Going into epoch 1") == 1
    assert output.count("test set ") == 1
    summary = (tmp_path / "summary.txt").read_text()
    assert "\ncommand      torchrun --nproc-per-node 2 train_CTC.py " in summary


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_equal_one(tmp_path):
    """The same over NCCL."""
    options = {**runs.PLAIN, "number_of_epochs": 2, "device": "cuda"}
    runs.train(CTC, tmp_path / "one", grad_accumulation_factor=2, **options)
    command = runs.command(CTC, tmp_path / "two", **options)
    status, output = finish(start_ranks(command[1:], "--standalone", "--nproc-per-node", 2))
    assert status == 0, output
    assert_same_curve(tmp_path / "two", tmp_path / "one")


def test_two_nodes_equal_one_process(one_process, tmp_path):
    reference, options = one_process
    command = runs.command(CTC, tmp_path, **options)
    meeting = ["--master-addr", "127.0.0.1", "--master-port", free_port()]
    nodes = [
        start_ranks(
            command[1:], "--nnodes", 2, "--node-rank", rank, "--nproc-per-node", 1, *meeting
        )
        for rank in (0, 1)
    ]
    for status, output in [finish(node) for node in nodes]:
        assert status == 0, output
    assert_same_curve(tmp_path, reference)


def test_s2s_with_one_batch_a_rank(tmp_path):
    options = {**runs.PLAIN, "number_of_epochs": 2, "dynamic_batching": False, "batch_size": 12}
    runs.train(S2S, tmp_path / "one", grad_accumulation_factor=2, **options)
    command = runs.command(S2S, tmp_path / "two", **options)
    status, output = finish(start_ranks(command[1:], "--standalone", "--nproc-per-node", 2))
    assert status == 0, output
    assert [line["steps"] for line in runs.log_lines(tmp_path / "two")] == [1, 2]
    assert_same_curve(tmp_path / "two", tmp_path / "one")


def test_the_main_process_works_alone_and_its_error_is_everyones(tmp_path):
    script = [str(runs.ROOT / "tests/recipes/ranks.py"), str(tmp_path)]
    status, output = finish(start_ranks(script, "--standalone", "--nproc-per-node", 2))
    assert status == 0, output
    assert (tmp_path / "prepared").read_text() == "once\n"
    for rank in (0, 1):
        assert (tmp_path / f"rank{rank}").read_text() == "once\nno such corpus"


# One is found by every rank before they meet, one by the main process while the other waits.
@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ({"d_modl": 16}, "unknown option --d_modl; did you mean d_model?"),
        ({"data_folder": "/no/corpus"}, "/no/corpus"),
    ],
)
def test_a_mistake_is_told_once_and_ends_all_ranks(mistake, message, tmp_path):
    command = runs.command(CTC, tmp_path / "run", **mistake)
    started = time.monotonic()
    status, output = finish(start_ranks(command[1:], "--standalone", "--nproc-per-node", 2))
    assert status != 0
    assert time.monotonic() - started < 60
    (told,) = [line for line in output.splitlines() if line.startswith("error:")]
    assert message in told
    # torchrun reports in its own way that a process failed; none of ours shows a stack.
    assert "UserError" not in output
    assert output.count("Traceback") <= 1


# ---- Sharing the batches, without processes ----


class Batches:
    """Stands for a batch sampler whose number of batches changes with the epoch."""

    def __init__(self, number):
        self.number, self.epoch = number, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return self.number + self.epoch

    def __iter__(self):
        return iter([[i] for i in range(len(self))])


def test_an_epochs_batches_are_those_of_the_first_reading():
    """SpeechBrain's sampler has another order when it is read again in an epoch."""

    def dynamic():
        lengths = [1 + i % 7 for i in range(60)]
        durations = DynamicItemDataset({str(i): {"duration": x} for i, x in enumerate(lengths)})
        return DynamicBatchSampler(
            durations, 12, num_buckets=3, length_func=lambda x: x["duration"]
        )

    ours, theirs = WholeStepSampler(dynamic()), dynamic()
    for epoch in (1, 2):
        for sampler in (ours, theirs):
            sampler.set_epoch(epoch)
        first, digest = list(ours), ours.digest
        assert first == list(theirs)
        assert first == list(ours) != list(theirs)
        ours.set_epoch(epoch)
        assert (list(ours), ours.digest) == (first, digest)


@pytest.mark.parametrize("number", [1, 2, 5, 6, 7])
@pytest.mark.parametrize(("accumulation", "world_size"), [(1, 1), (3, 1), (1, 2), (2, 2), (2, 4)])
def test_ranks_share_whole_steps(number, accumulation, world_size):
    one = WholeStepSampler(Batches(number), accumulation * world_size)
    ranks = [
        WholeStepSampler(Batches(number), accumulation, r, world_size) for r in range(world_size)
    ]
    for epoch in (0, 1):
        for sampler in (one, *ranks):
            sampler.set_epoch(epoch)
        shares = [list(sampler) for sampler in ranks]
        assert {len(share) for share in shares} == {len(ranks[0])}
        assert len(ranks[0]) % accumulation == 0
        # Step by step, the ranks together take what one process takes.
        together = [batch for round_ in zip(*shares, strict=True) for batch in round_]
        assert together == list(one)
        assert len(together) - (number + epoch) < accumulation * world_size
        seen = Counter(batch[0] for batch in together)
        assert seen.keys() == set(range(number + epoch))
