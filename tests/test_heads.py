"""A head that learns its bias by a product learns what PyTorch's does."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from modules import heads

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return request.param


def learn(head, inputs, **autocast):
    """Logits of all inputs, and the gradients of inputs and head."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    with torch.autocast(inputs[0].device.type, torch.bfloat16, **autocast):
        logits = [head(x) for x in inputs]
    loss = sum(
        (y.float() * torch.linspace(-1, 2, y.shape[-1]).to(y)).square().sum() for y in logits
    )
    return logits, torch.autograd.grad(loss, [*inputs, head.weight, head.bias])


@pytest.mark.parametrize("channels", [16, 20])
def test_it_learns_what_pytorch_s_does(channels, device, monkeypatch):
    torch.manual_seed(0)
    head = nn.Linear(channels, 31).to(device)
    inputs = [torch.randn(3, n, channels, device=device) for n in (17, 5)]  # used twice
    expected = learn(head, inputs)
    monkeypatch.setattr(heads, "supports", lambda head, x: True)
    heads.learn_biases_by_products({"ctc_head": head})
    got = learn(head, inputs)
    for y, z in zip(got[0], expected[0], strict=True):
        assert y.shape == z.shape and y.dtype == z.dtype == torch.bfloat16
        torch.testing.assert_close(y, z, rtol=1e-2, atol=1e-2)
    for g, e in zip(got[1], expected[1], strict=True):
        assert g.dtype == e.dtype == torch.float32
        assert (g - e).norm() < 1e-2 * e.norm()


def test_to_rounding_in_float64():
    torch.manual_seed(0)
    shapes = (2, 9, 12), (7, 12), (7,)
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    results = []
    for layer in (F.linear, lambda *t: heads.BiasByProduct.apply(*t, torch.float64)):
        y = layer(*tensors)
        results.append([y, *torch.autograd.grad(y.sin().sum(), tensors)])
    assert heads.BiasByProduct.apply(tensors[0][:0], *tensors[1:], torch.float64).shape == (0, 9, 7)
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bf16", [False, True])
def test_on_a_cpu_nothing_changes(bf16):
    torch.manual_seed(0)
    head, x = nn.Linear(12, 31), torch.randn(2, 9, 12)
    names, expected = list(head.state_dict()), learn(head, [x], enabled=bf16)
    heads.learn_biases_by_products({"ctc_head": head})
    got = learn(head, [x], enabled=bf16)
    assert list(head.state_dict()) == names
    assert all(map(torch.equal, (*got[0], *got[1]), (*expected[0], *expected[1])))


def test_where_it_is_not_worth_it(device):
    head, x = nn.Linear(8, 4).to(device), torch.ones(2, 8, device=device)
    half = torch.autocast(device, torch.bfloat16)
    with half:
        assert heads.supports(head, x) == (device == "cuda")
        with torch.no_grad():
            assert not heads.supports(head, x)
        assert not heads.supports(nn.Linear(8, 4, bias=False).to(device), x)
        head.weight.requires_grad_(False)
        assert not heads.supports(head, x)
    assert not heads.supports(nn.Linear(8, 4).to(device), x)  # float32
