"""Batches on their way to the device."""

import pytest
import torch
from speechbrain.dataio.batch import PaddedBatch

from modules.transfer import Transfer


def batch_of(*lengths):
    return PaddedBatch(
        [{"id": str(n), "sig": torch.arange(n, dtype=torch.float32)} for n in lengths]
    )


def test_a_cpu_gets_the_batch_as_it_is():
    transfer, batch = Transfer("cpu"), batch_of(3, 5)
    assert not transfer.pins
    assert transfer(batch) is batch
    torch.testing.assert_close(batch.sig.lengths, torch.tensor([0.6, 1.0]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_copy_waits_for_no_work_and_later_work_for_the_copy():
    transfer, copied = Transfer("cuda"), torch.cuda.Event()
    transfer(batch_of(10))  # the first allocates
    before = torch.cuda.Event()
    torch.cuda._sleep(10**9)
    before.record()
    batch = transfer(batch_of(4000, 5000).pin_memory())
    copied.record(transfer.stream)
    copied.synchronize()
    assert not before.query()
    torch.testing.assert_close(batch.sig.data[1].cpu(), torch.arange(5000, dtype=torch.float32))
    torch.testing.assert_close(batch.sig.lengths.cpu(), torch.tensor([0.8, 1.0]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_batch_keeps_its_memory_until_its_work_is_done():
    transfer = Transfer("cuda")
    batch = transfer(batch_of(100_000).pin_memory())
    torch.cuda._sleep(10**9)
    total = batch.sig.data.sum()
    expected = torch.arange(100_000, dtype=torch.float32).sum()
    del batch
    for _ in range(3):  # of the same size, in a stream that does not wait
        transfer(PaddedBatch([{"sig": torch.zeros(100_000)}]).pin_memory())
    torch.testing.assert_close(total.cpu(), expected)
