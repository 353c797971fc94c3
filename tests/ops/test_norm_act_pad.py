"""A block's end by Triton equals the parts that the frontend has elsewhere, in float64.

Triton runs on a CUDA device, elsewhere in its interpreter, in a process of its own.
"""

from functools import partial

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from modules.frontend import ConvFrontend, reflect_bins, reflect_frames
from modules.lengths import zero_padding
from modules.ops.norm_act_pad import norm_act_pad, patches
from tests.ops.interpreted import (
    DEVICE,
    assert_near,
    compile_kernel,
    gpu,
    installed,
    outside,
    run_in_the_interpreter,
    runs_kernels,
)

OPTIONS = {"eps": 1e-5, "slope": 0.01}
EIGHT = {"channels": (16, 12, 8), "separable": True}


@installed
@outside
def test_in_the_interpreter():
    assert run_in_the_interpreter(__file__) >= 33


def tensors(B, T, bins, channels, dtype=torch.float32):
    generator = torch.Generator().manual_seed(T)
    x = torch.randn(B, T, bins, channels, generator=generator).to(dtype)
    weight, bias = torch.randn(2, bins, channels, generator=generator)
    lengths = torch.randint(1, T + 1, (B,), generator=generator)
    lengths[0], lengths[-1] = T, 1
    return [t.to(DEVICE) for t in (x, weight, bias, lengths)]


def reference(x, weight, bias, lengths, reach, keep=1.0):
    """The frontend's parts one after another; keep: what dropout multiplies by."""
    y = F.leaky_relu(F.layer_norm(x, x.shape[2:], weight, bias, OPTIONS["eps"]), OPTIONS["slope"])
    y = zero_padding(y * keep, lengths)
    if reach:
        y = reflect_bins(reflect_frames(y, lengths, reach), reach)
    return zero_padding(y, lengths + 2 * reach)


def with_gradients(function, *inputs, seed=0):
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    y = function(*inputs)
    generator = torch.Generator().manual_seed(seed)
    dy = torch.randn(y.shape, generator=generator).to(y)
    return y.detach(), *torch.autograd.grad(y, inputs, dy)


@runs_kernels
@pytest.mark.parametrize("reach", [0, 1, 2])
@pytest.mark.parametrize(
    ("size", "dtype", "tolerance"),
    [
        ((3, 11, 5, 3), torch.float32, 1e-5),
        ((4, 3, 4, 8), torch.float32, 1e-5),
        ((1, 1, 3, 2), torch.float32, 1e-5),
        ((3, 9, 5, 32), torch.bfloat16, 1e-2),
    ],
)
def test_equals_the_parts(size, dtype, tolerance, reach):
    x, weight, bias, lengths = tensors(*size, dtype)
    got = with_gradients(
        lambda *t: norm_act_pad(*t, lengths, reach=reach, **OPTIONS), x, weight, bias
    )
    wide = [t.double() for t in (x, weight, bias)]
    expected = with_gradients(lambda *t: reference(*t, lengths, reach), *wide)
    assert got[0].dtype == dtype
    assert_near([t.double() for t in got], expected, tolerance)


@runs_kernels
@pytest.mark.parametrize(
    ("size", "dtype", "tolerance"),
    [
        ((3, 11, 5, 3), torch.float32, 1e-5),  # in one part
        ((3, 9, 5, 16), torch.float32, 1e-5),  # in five
        ((2, 7, 6, 24), torch.float32, 1e-5),  # too many channels for three
        ((3, 9, 5, 32), torch.bfloat16, 1e-2),
    ],
)
def test_an_offset_is_added_before(size, dtype, tolerance):
    x, weight, bias, lengths = tensors(*size, dtype)
    offset = torch.linspace(-2, 2, size[-1], device=DEVICE).to(dtype)
    got = with_gradients(
        lambda x, offset, *t: norm_act_pad(x, *t, lengths, reach=1, offset=offset, **OPTIONS),
        *(x, offset, weight, bias),
    )
    expected = with_gradients(
        lambda x, offset, *t: reference(x + offset, *t, lengths, 1),
        *(t.double() for t in (x, offset, weight, bias)),
    )
    assert got[2].dtype == dtype
    assert_near([t.double() for t in got], expected, tolerance)


@runs_kernels
@pytest.mark.parametrize("options", [{"channels": (16, 8)}, EIGHT])
def test_a_frontend_learns_the_same(options, monkeypatch):
    """Its later convolutions leave their bias to the kernel."""
    torch.manual_seed(0)
    frontend = ConvFrontend(20, dropout=0.0, **options).to(DEVICE)
    x, lengths = torch.randn(3, 41, 20, device=DEVICE), torch.tensor([41, 17, 1], device=DEVICE)
    results = []
    for fused in (True, False):
        monkeypatch.setattr("modules.ops.norm_act_pad.supports", lambda x, reach, on=fused: on)
        y, _ = frontend(x, lengths)
        dy = torch.linspace(-1, 1, y.numel(), device=DEVICE).view_as(y)
        results.append([y, *torch.autograd.grad(y, list(frontend.parameters()), dy)])
    assert_near(*results, 1e-4)


@runs_kernels
def test_what_is_dropped_is_dropped_backward_too():
    x, weight, bias, lengths = tensors(4, 30, 6, 16)
    torch.manual_seed(0)
    got = with_gradients(
        lambda *t: norm_act_pad(*t, lengths, reach=1, dropout=0.3, **OPTIONS), x, weight, bias
    )
    keep = (got[0][:, 1:-1, 1:-1] != 0) / 0.7  # of each frame as it lies there
    valid = zero_padding(torch.ones_like(x), lengths) > 0
    assert abs((keep[valid] > 0).double().mean() - 0.7) < 0.02
    wide = [t.double() for t in (x, weight, bias)]
    expected = with_gradients(lambda *t: reference(*t, lengths, 1, keep.double()), *wide)
    assert_near([t.double() for t in got], expected, 1e-5)
    again = norm_act_pad(x, weight, bias, lengths, reach=1, dropout=0.3, **OPTIONS)
    assert not torch.equal(again, got[0])  # it draws anew


@runs_kernels
def test_an_utterance_without_frames():
    x, weight, bias, lengths = tensors(3, 9, 5, 4)
    lengths[1] = 0
    run = partial(norm_act_pad, reach=1, **OPTIONS)
    y, dx, *_ = with_gradients(lambda *t: run(*t, lengths), x, weight, bias)
    assert not y[1].any() and not dx[1].any()
    others = torch.tensor([0, 2], device=DEVICE)
    assert torch.equal(y[others], run(x[others], weight, bias, lengths[others]))


@runs_kernels
def test_gradients_without_frames():
    x, weight, bias, lengths = tensors(2, 1, 5, 4)
    x, offset = x[:, :0], bias[0]
    results = with_gradients(
        lambda x, offset, *t: norm_act_pad(x, *t, 0 * lengths, offset=offset, **OPTIONS),
        *(x, offset, weight, bias),
    )
    assert results[1].shape == x.shape and not any(t.any() for t in results[2:])


@runs_kernels
@pytest.mark.parametrize("dropout", [0.0, 1.0])
def test_dropout_of_nothing_and_of_all(dropout):
    x, weight, bias, lengths = tensors(3, 9, 5, 4)
    before = torch.get_rng_state()
    run = partial(norm_act_pad, reach=1, dropout=dropout, **OPTIONS)
    results = with_gradients(lambda *t: run(*t, lengths), x, weight, bias)
    if dropout:
        assert not any(t.any() for t in results)
    else:
        assert torch.equal(torch.get_rng_state(), before)


@runs_kernels
def test_padding_is_not_read():
    x, weight, bias, lengths = tensors(3, 9, 5, 4)
    past = zero_padding(torch.ones_like(x), lengths) == 0
    y = with_gradients(lambda *t: norm_act_pad(*t, lengths, reach=1, **OPTIONS), x, weight, bias)
    x = x.masked_fill(past, float("nan"))
    z = with_gradients(lambda *t: norm_act_pad(*t, lengths, reach=1, **OPTIONS), x, weight, bias)
    assert all(map(torch.equal, y, z))


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("T", "bins", "size", "stride"), [(11, 5, 3, 2), (1, 2, 3, 2), (12, 80, 3, 2), (9, 7, 5, 3)]
)
def test_patches_equal_the_parts(T, bins, size, stride, dtype):
    x, _, _, lengths = tensors(4, T, bins, 1)
    x, reach = x.squeeze(3), size // 2
    padding = zero_padding(torch.ones_like(x), lengths) == 0
    padded = reflect_bins(reflect_frames(zero_padding(x, lengths), lengths, reach), reach)
    expected = padded.unfold(1, size, stride).unfold(2, size, stride).flatten(3)
    columns = size**2 // 8 * 8 + 8
    expected = F.pad(expected, (0, columns - size**2), value=1.0).to(dtype)
    x = x.masked_fill(padding, float("nan"))
    got = patches(x, lengths, (size, size), stride, reach, columns, dtype)
    # The interpreter cuts bfloat16 off where a GPU rounds.
    torch.testing.assert_close(got, expected, rtol=0 if dtype == torch.float32 else 2**-7, atol=0)


@runs_kernels
def test_patches_of_an_utterance_without_frames():
    x, lengths = torch.randn(2, 4, 6, device=DEVICE), torch.tensor([0, 4], device=DEVICE)
    got = patches(x, lengths, (3, 3), 2, 1, 16, torch.float32)
    assert not got[0, ..., :9].any() and (got[0, ..., 9:] == 1).all() and got[1, ..., :9].any()


@installed
@outside
@pytest.mark.parametrize(("bins", "channels", "width"), [(40, 64, 512), (20, 32, 128)])
def test_nothing_is_spilled(bins, channels, width):
    """Both blocks of all sizes, the second with the bias of its convolution."""
    from modules.ops.norm_act_pad.triton import REGISTERS, parts_of, warps_of
    from modules.ops.norm_act_pad.triton_kernels import backward_kernel, forward_kernel

    assert parts_of(bins * channels, channels) == (width, 5)
    pointers = {"keys": "i32", "out": "bf16", "dout": "bf16", "dx": "bf16", "x": "bf16"}
    constants = {
        "BINS": bins,
        "CHANNELS": channels,
        "REACH": 1,
        "WIDTH": width,
        "PARTS": 5,
        "DROPS": True,
        "BIN": channels,
        "ROWS": 8,
    }
    constants |= {"slope": 0.01, "threshold": 0, "scale": 2.0, "eps": 1e-5}
    if bins == 40:
        constants |= {"offset": None, "doffsets": None}
    pointers["offset"] = "bf16"
    for kernel, each, registers in ((forward_kernel, 20, None), (backward_kernel, 10, REGISTERS)):
        warps = warps_of(width, 5, each)
        _, spilled, _ = compile_kernel(kernel, "bf16", constants, warps, registers, **pointers)
        assert spilled == 0


@pytest.mark.gpu
@gpu
@runs_kernels
@pytest.mark.parametrize("bf16", [False, True])
def test_a_frontend_on_a_gpu(bf16, monkeypatch):
    torch.manual_seed(0)
    frontend = ConvFrontend(dropout=0.0).cuda()
    x, lengths = torch.randn(4, 203, 80, device="cuda"), torch.tensor([203, 150, 4, 1]).cuda()
    results, calls, original = [], [], frontend.fused
    monkeypatch.setattr(frontend, "fused", lambda *t: calls.append(t) or original(*t))
    for fused in (True, False):
        if not fused:
            monkeypatch.setattr("modules.ops.norm_act_pad.supports", lambda x, reach: False)
        frontend.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
            y, frames = frontend(x, lengths)
        (y.float() * torch.linspace(-1, 1, y.numel(), device="cuda").view_as(y)).sum().backward()
        results.append([y.double(), *(p.grad.double() for p in frontend.parameters())])
    assert frames.tolist() == [51, 38, 1, 1] and len(calls) == 1
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() <= (2e-2 if bf16 else 1e-3) * b.norm()


def test_blocks_too_narrow_to_reflect_are_left_to_the_parts(monkeypatch):
    """Three bins become two, and two one, of which the kernel would read beside them."""
    monkeypatch.setattr("modules.ops.norm_act_pad.supports", lambda x, reach: x.shape[2] > reach)
    lengths = torch.tensor([9, 5])
    for n_mels, narrow in ((2, True), (3, False)):
        frontend = ConvFrontend(n_mels, dropout=0.0)
        calls = []
        monkeypatch.setattr(frontend, "fused", lambda *t, calls=calls: calls.append(t))
        frontend(torch.randn(2, 9, n_mels), lengths)
        assert (not calls) == narrow
