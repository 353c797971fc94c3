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
def prefetch_frames(
    u, dt, z, dy, BC, t, u_t, dt_t, z_t, dy_t, words, block, d_read, channels,
    N: tl.constexpr, PACKED: tl.constexpr, EXTRA: tl.constexpr,
):  # fmt: skip
    """What a block of channels reads of frames t (LANES,); z and dy may be None.

    The pointers are the lanes' own, at their channels d_read.
    """
    WIDTH: tl.constexpr = LANES + 8 * EXTRA
    WORDS: tl.constexpr = N if PACKED else 2 * N
    start, end = block * WIDTH - d_read, channels - 1 - d_read
    prefetch_rows(u, t, u_t, start, end, WIDTH)
    prefetch_rows(dt, t, dt_t, start, end, WIDTH)
    if dy is not None:
        prefetch_rows(dy, t, dy_t, start, end, WIDTH)
    if z is not None:
        prefetch_rows(z, t, z_t, start, end, WIDTH)
    prefetch_rows(BC, t, words, 0, WORDS - 1, WORDS)


@triton.jit
def prefetch_states(p, KEPT: tl.constexpr):
    """So many states, as `triton_layout.keep` puts them."""
    lane = tl.arange(0, LANES)
    for i in tl.static_range(0, KEPT * 4, SECTOR * LANES):
        prefetch(p + tl.minimum(i // 4 + lane * (SECTOR // 4), KEPT - 1))
