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
    chunk: the backward's frames in registers; forward, backward: cycles of one and of two warps of
    a scheduler.
    """

    extra: int
    registers: int
    chunk: int
    forward: tuple
    backward: tuple

    @property
    def channels(self):
        return 32 + 8 * self.extra

    def blocks(self, channels):
        return -(-channels // self.channels)

    def cycles(self, scans, channels, schedulers):
        """Forward and backward, of the scheduler with the most warps."""
        one, two = map(sum, zip(self.forward, self.backward, strict=True))
        warps = -(-scans * self.blocks(channels) // schedulers)
        return one if warps <= 1 else warps * two / 2


# Left to itself the assembler spares registers, for warps that are not there: it waits for every
# shuffle in turn, and a frame takes twice its time.
EXTENTS = (
    Extent(0, registers=128, chunk=4, forward=(1140, 1902), backward=(2458, 4545)),
    Extent(1, registers=255, chunk=2, forward=(1282, 2265), backward=(3842, 6990)),
)


def extent_of(scans, channels, device):
    """The extent of least time for so many scans of so many channels.

    It is the same without a backward pass, so that a forward that is repeated for one gives the
    same bits.
    """
    schedulers = SCHEDULERS * _processors(device)
    return min(EXTENTS, key=lambda x: x.cycles(scans, channels, schedulers))


@functools.cache
def _processors(device):
    there = device.type == "cuda"
    return torch.cuda.get_device_properties(device).multi_processor_count if there else H100
