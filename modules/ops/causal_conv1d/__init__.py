"""The causal depthwise convolution: the public function, its checks and the choice of backend."""

import torch

from modules.ops import kernels
from modules.ops.backends import OK, Backends, Call
from modules.ops.causal_conv1d import cuda, naive, pytorch, triton
from modules.ops.shapes import check_shapes

# In the order in which "auto" tries them.
_backends = Backends(
    "causal_conv1d",
    "MAMBA_ASR_CONV_BACKEND",
    {
        # Interpreted, for tests, it runs on CPUs too: then only when asked for.
        **({} if triton.interpreting() else {"triton": triton}),
        "causal_conv1d": cuda,
        "torch": pytorch,
        "triton": triton,
        "naive": naive,
    },
    reference="naive",
)
set_backend = _backends.set_default
available_backends = _backends.available
exporting = _backends.forced


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str | None = None,
    lengths: torch.Tensor | None = None,
    reverse: bool = False,
    initial_state: torch.Tensor | None = None,
    return_state: bool = False,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Convolve every channel of a right-padded batch: y_t = bias + sum_k w_k x_{t - K + 1 + k}.

    x: (B, T, D); weight: (D, K); bias: (D,); activation: None or "silu"
    lengths: (B,) integers, in frames. From there on x counts as zero and the result is zero,
        whatever x holds there.
    reverse: the mirror image, w_k times x_{t + K - 1 - k}, from frame lengths - 1 down to 0.
    initial_state: (B, D, K - 1), the inputs before the first, oldest first; zero if None.
    backend: a name from `available_backends()`; "auto" leaves the choice to the environment
        variable MAMBA_ASR_CONV_BACKEND, then `set_backend`, then the device.
    -> y (B, T, D), or (y, state): the last K - 1 valid inputs, in the order of the scan. Both in
        x's dtype.
    Raises ValueError on arguments that do not fit, UserError on a backend that cannot run.
    """
    _check(x, weight, bias, activation, lengths, initial_state)
    call = Call(
        device=x.device.type,
        dtype=x.dtype,
        width=weight.shape[1],
        needs_grad=torch.is_grad_enabled()
        and any(t is not None and t.requires_grad for t in (x, weight, bias, initial_state)),
        initial_state=initial_state is not None,
        return_state=return_state,
    )
    if kernels.traced(x):
        module = triton if triton.supports(call) == OK else pytorch
    else:
        module = _backends.pick(backend, call)
    run = module.causal_conv1d
    if x.shape[1] == 0:
        shape = (x.shape[0], weight.shape[0], weight.shape[1] - 1)
        state = x.new_zeros(shape) if initial_state is None else initial_state.to(x.dtype)
        y = torch.zeros_like(x)
    else:
        y, state = run(x, weight, bias, activation, lengths, reverse, initial_state, return_state)
    return (y, state) if return_state else y


def bidirectional_conv1d(
    x: torch.Tensor,
    weights: torch.Tensor,
    biases: torch.Tensor,
    lengths: torch.Tensor | None,
    activation: str | None = "silu",
    *,
    twice: bool = False,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`causal_conv1d` forward in time and in reverse, each with its own weights, x read once.

    x: (B, T, D); weights: (2, D, K); biases: (2, D); lengths: (B,) or None
    twice: for two readers, whose gradients the backward pass adds as it reads them
    -> y (2, B, T, D): forward in time, reverse; or (y, y), in the same memory
    Raises as `causal_conv1d` does.
    """
    if len(weights) != 2 or len(biases) != 2:
        raise ValueError(
            f"weights are {tuple(weights.shape)} and biases {tuple(biases.shape)}; "
            "expected (2, D, K) and (2, D), one for each direction"
        )
    _check(x, weights[0], biases[0], activation, lengths, None)
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (x, weights, biases))
    call = Call(x.device.type, x.dtype, weights.shape[2], needs_grad, False, False)
    run = triton if kernels.traced(x) else _backends.pick(backend, call)
    if run is triton and x.shape[1] > 0:
        both = triton.bidirectional_conv1d_twice if twice else triton.bidirectional_conv1d
        return both(x, weights, biases, lengths, activation)
    options = {"activation": activation, "lengths": lengths, "backend": backend}
    y = [
        causal_conv1d(x, weight, bias, reverse=reverse, **options)
        for weight, bias, reverse in zip(weights, biases, (False, True), strict=True)
    ]
    y = torch.stack(y)
    return (y, y) if twice else y


def _check(x, weight, bias, activation, lengths, initial_state):
    if x.dim() != 3 or weight.dim() != 2:
        raise ValueError(
            f"x is {tuple(x.shape)} and weight {tuple(weight.shape)}; expected (B, T, D) and (D, K)"
        )
    batch, _, channels = x.shape
    kernel = weight.shape[1]
    expected = {
        "weight": (weight, (channels, kernel)),
        "bias": (bias, (channels,)),
        "lengths": (lengths, (batch,)),
        "initial_state": (initial_state, (batch, channels, kernel - 1)),
    }
    check_shapes(expected, x=(x, "(B, T, D)"), weight=(weight, "(D, K)"))
    if activation not in (None, "silu"):
        raise ValueError(f"activation is {activation!r}; expected None or 'silu'")
