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
    """A program's channels, and cycles of four frames by benchmarks/machine_code.py.

    extra: channels that four lanes share besides their four; registers: a thread's in the forward;
    chunk: the backward's frames in registers; forward, both: cycles of one and two warps of a
    scheduler, in the forward pass and in the forward and the backward.
    """

    extra: int
    registers: int
    chunk: int
    forward: tuple
    both: tuple

    @property
    def channels(self):
        return 32 + 8 * self.extra

    def cycles(self, scans, channels, schedulers, backward):
        one, two = self.both if backward else self.forward
        warps = -(-scans * self.blocks(channels) // schedulers)
        return one if warps <= 1 else warps * two / 2

    def blocks(self, channels):
        return -(-channels // self.channels)


# Left to itself the assembler spares registers, for warps that are not there: it waits for every
# shuffle in turn, and a frame takes twice its time.
EXTENTS = (
    Extent(0, registers=128, chunk=4, forward=(1140, 1902), both=(3598, 6447)),
    Extent(1, registers=255, chunk=2, forward=(1282, 2265), both=(5124, 9255)),
)


def extent_of(scans, channels, device, backward):
    """The extent of least time for so many scans; `backward`: that one will follow."""
    schedulers = SCHEDULERS * _processors(device)
    return min(EXTENTS, key=lambda x: x.cycles(scans, channels, schedulers, backward))


@functools.cache
def _processors(device):
    there = device.type == "cuda"
    return torch.cuda.get_device_properties(device).multi_processor_count if there else H100
