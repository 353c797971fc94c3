"""How many channels a program of the selective scan's Triton kernels takes.

A program is a warp, which a scheduler of an SM runs to its end: what takes longest is the scheduler
with the most of them. With 576 warps for 528 schedulers (ConMamba-S, 32 utterances) 48 run two, and
the others wait. Of five channels for four lanes there are 512, each of which takes less time than
two of the others.
"""

import functools
from dataclasses import dataclass

import torch

SCHEDULERS = 4  # an SM's
H100 = 132  # its SMs, which also stand for a device that there is not


@dataclass(frozen=True)
class Extent:
    """A program's channels.

    extra: channels that four lanes share besides their four; registers: a thread's in the forward;
    chunk: the backward's frames in registers.
    """

    extra: int
    registers: int
    chunk: int

    @property
    def channels(self):
        return 32 + 8 * self.extra

    def blocks(self, channels):
        return -(-channels // self.channels)


# Left to itself the assembler spares registers, for warps that are not there: it waits for every
# shuffle in turn, and a frame takes twice its time.
USUAL = Extent(0, registers=128, chunk=4)
WIDE = Extent(1, registers=255, chunk=2)
EXTENTS = USUAL, WIDE


def extent_of(scans, channels, device):
    """The wide one where it alone leaves every scheduler one warp, for scans of so many channels.

    By benchmarks/machine_code.py four frames, forward and backward, take 5,124 cycles then, in
    place of 6,447 of two usual warps. It is the same without a backward pass, so that a forward
    that is repeated for one gives the same bits.
    """
    schedulers = SCHEDULERS * _processors(device)
    usual, wide = (scans * extent.blocks(channels) for extent in EXTENTS)
    return WIDE if wide <= schedulers < usual else USUAL


@functools.cache
def _processors(device):
    there = device.type == "cuda"
    return torch.cuda.get_device_properties(device).multi_processor_count if there else H100
