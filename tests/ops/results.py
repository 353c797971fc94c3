"""What an operator gives and its gradients, by name, compared."""

import torch


def results(leaves, y, state):
    """-> result, state and the gradients of a fixed mix of both, by name"""
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (x * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)).sum()
        for x in (y, state)
    )
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return {"y": y, "state": state, **dict(zip(leaves, gradients, strict=True))}


def assert_same(got, expected, **tolerance):
    tolerance = tolerance or {"rtol": 1e-9, "atol": 1e-10}
    for name in expected:
        torch.testing.assert_close(
            got[name], expected[name], **tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )
