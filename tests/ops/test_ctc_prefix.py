"""CTC prefixes by Triton are PyTorch's, which tests/search/test_prefix.py holds to SpeechBrain's.

Triton runs on a CUDA device, elsewhere in its interpreter, in a process of its own.
"""

import pytest
import torch

from modules.ops.backends import Call
from modules.ops.ctc_prefix import available_backends, extend, triton, weights
from tests.ops.interpreted import (
    DEVICE,
    INTERPRETED,
    compile_kernel,
    installed,
    outside,
    run_in_the_interpreter,
    runs_kernels,
)

V = 7  # tokens
# Lengths of utterances: one frame, a block of frames that is full, one more, padding.
LENGTHS = [(1,), (2, 1), (128, 100), (129, 3, 64), (300, 299)]


def make_prefixes(lengths, beam, seed):
    """What a search keeps before its first token, and whom and what it takes in a few steps."""
    generator = torch.Generator().manual_seed(seed)
    batch, frames = len(lengths), max(lengths)
    logits = 4 * torch.randn(batch, V, frames, generator=generator, dtype=torch.float64)
    valid = torch.arange(frames) < torch.tensor(lengths)[:, None]
    probs = (logits.softmax(1) * valid[:, None]).flatten(0, 1)
    utterances = torch.arange(batch).repeat_interleave(beam)
    valid = valid[utterances]
    blanks = torch.where(valid, probs[utterances * V].log(), 0.0).cumsum(1)
    blanks = torch.nn.functional.pad(blanks, (1, 0))
    steps = []
    for _ in range(4):
        local = torch.randint(beam, (batch * beam,), generator=generator)
        tokens = torch.randint(1, V, (batch * beam,), generator=generator)
        repeats = torch.rand(batch * beam, generator=generator) < 0.4
        steps.append((utterances * V + tokens, utterances * beam + local, repeats))
    return [x.to(DEVICE) for x in (probs, valid, blanks)], [
        [x.to(DEVICE) for x in step] for step in steps
    ]


def assert_equal(found, expected):
    assert not any(x.isnan().any() for x in found)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@runs_kernels
@pytest.mark.parametrize("lengths", LENGTHS)
def test_triton_equals_torch(lengths):
    """Also once an utterance has no frame left for its tokens."""
    (probs, valid, blanks), steps = make_prefixes(lengths, 3, len(lengths))
    blank, total = blanks.clone(), blanks.clone()
    dead = 0
    for rows, predecessors, repeats in steps:
        given = (probs, rows, valid, blank, total)
        assert_equal(weights(*given, backend="triton"), weights(*given, backend="torch"))
        given = (probs, rows, valid, blanks, blank, total, predecessors, repeats)
        found, expected = (extend(*given, backend=name) for name in ("triton", "torch"))
        assert_equal(found, expected)
        blank, total = expected
        dead += int(total.isneginf().all(1).sum())
    assert dead > 0 or min(lengths) > 3


@outside
@installed
def test_in_the_interpreter():
    assert run_in_the_interpreter(__file__) == len(LENGTHS) + 1


def test_triton_leaves_other_types_and_long_utterances_to_torch():
    def reason(dtype, frames):
        return triton.supports(Call("cuda", dtype, frames, False, False, False))

    assert reason(torch.float64, triton.FRAMES) == "ok"
    assert "frames" in reason(torch.float64, triton.FRAMES + 1)
    assert "float64" in reason(torch.float32, 100)
    assert set(available_backends()) == {"torch", "triton"}


@installed
@pytest.mark.skipif(INTERPRETED, reason="there is no compiler then")
@pytest.mark.parametrize("name", ["extend_kernel", "weights_kernel"])
@pytest.mark.parametrize(("frames", "warps"), [(512, 4), (triton.FRAMES, 16)])
def test_triton_compiles_for_an_h200(name, frames, warps):
    """Which needs no device."""
    from modules.ops.ctc_prefix import triton_kernels

    kernel = getattr(triton_kernels, name)
    pointers = dict.fromkeys(kernel.arg_names, "fp64")
    pointers |= dict.fromkeys(("token_rows", "predecessors"), "i64")
    pointers |= dict.fromkeys(("valid", "repeats"), "i1")
    constants = {"FRAMES": frames}
    assert compile_kernel(kernel, "fp64", constants, warps, **pointers)[1] == 0
