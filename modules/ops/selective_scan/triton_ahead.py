"""What the selective scan's Triton kernels ask for long before they load it, for the cache to have.

A load takes 280 cycles where the L2 cache answers, 700 and more where memory does. Each is a chunk
of frames ahead, but of six scoreboards some have to tell of loads and of shuffles alike: who waits
for a shuffle then waits for a load behind it. A prefetch has no scoreboard and takes no register.
"""

import triton
import triton.language as tl

from modules.ops.kernels import interpreting
from modules.ops.selective_scan.triton_frames import at
from modules.ops.selective_scan.triton_layout import LANES

ON_A_DEVICE = tl.constexpr(not interpreting())  # the interpreter has neither cache nor assembler
SECTOR = tl.constexpr(32)  # bytes, of which a cache's line has four


@triton.jit
def prefetch(p):
    """What lies at p (LANES,), a sector each."""
    if ON_A_DEVICE:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
            "=r,l",
            [p.to(tl.int64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def prefetch_rows(p, t, stride, start, end, WIDTH: tl.constexpr):
    """WIDTH numbers of each frame t (LANES,), from `start` on, but no further than `end`."""
    size: tl.constexpr = p.dtype.element_ty.primitive_bitwidth // 8
    for i in tl.static_range(0, WIDTH * size, SECTOR):
        prefetch(at(p + tl.minimum(start + i // size, end), t, stride))


@triton.jit
def prefetch_states(p, KEPT: tl.constexpr):
    """So many states, as `triton_layout.keep` puts them."""
    lane = tl.arange(0, LANES)
    for i in tl.static_range(0, KEPT * 4, SECTOR * LANES):
        prefetch(p + tl.minimum(i // 4 + lane * (SECTOR // 4), KEPT - 1))
