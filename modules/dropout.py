"""Dropout that costs compiled code little: a few operations an element for a random number."""

import torch
from torch import nn


class Dropout(nn.Dropout):
    """PyTorch's, which in compiled code on a GPU draws by `keep`.

    Inductor gives every element a Philox call, some hundred instructions for four numbers of which
    one is used. A feed-forward module's activation and dropout took four times what their bytes do.
    """

    keys = None  # of this pass, where `draw_together` draws them; else it draws two itself

    def forward(self, x):
        """x of any shape -> the same shape."""
        drops = self.training and 0 < self.p < 1
        if not (drops and x.is_cuda and torch.compiler.is_compiling()):
            return super().forward(x)
        return x * keep(x, self.p, self.keys) * (1 / (1 - self.p))


def draw_together(network):
    """Draw the random numbers of all dropouts of a network at once, before each of its passes.

    Two launches in place of one each. A module is one dropout: used twice in a pass, it would drop
    the same elements twice.
    """
    network.dropouts = [m for m in network.modules() if isinstance(m, Dropout) and 0 < m.p < 1]
    if network.dropouts:
        network.register_forward_pre_hook(_draw)


def _draw(network, inputs):
    if not network.training:
        return
    drawn = draw_keys(next(network.parameters()), len(network.dropouts))
    # Each in memory of its own: code compiled for one layer would not serve another whose tensor
    # begins elsewhere in a common one. New ones, as a backward pass may still need the last.
    keys = [torch.empty_like(pair) for pair in drawn]
    torch._foreach_copy_(keys, list(drawn))
    for dropout, pair in zip(network.dropouts, keys, strict=True):
        dropout.keys = pair


def keep(x, p, keys=None):
    """Whether each element of x stays, with a probability of 1 - p: a bool tensor like x.

    The element's number and two random numbers of PyTorch's, hashed: counter-based, as Philox is
    (Salmon et al. 2011), by a shorter function. That is Wellons' "lowbias32"
    (https://nullprogram.com/blog/2018/07/31/) of the number and the first, and again of the result
    and the second. It begins and ends with x ^ x >> 16. Between the two these cancel but for a
    change of the second number, as random after it; the last would change lower bits alone.
    keys: the two, (2, 1) int32; None: drawn here.
    """
    first, second = draw_keys(x)[0] if keys is None else keys
    number = torch.arange(x.numel(), device=x.device, dtype=torch.int32) ^ first
    number = number ^ (number >> 16 & 0xFFFF)
    return (scramble(scramble(number) ^ second) >= int(2**32 * p) - 2**31).view(x.shape)


@torch.library.custom_op(
    "mamba_asr::dropout_keys", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,)
)
def draw_keys(x: torch.Tensor, number: int = 1) -> torch.Tensor:
    """Pairs of random numbers on x's device, (number, 2, 1) int32.

    An operator that Inductor cannot look into: it drew them anew for every element, in the kernel
    that hashes them.
    """
    size = number, 2, 1
    return torch.randint(-(2**31), 2**31 - 1, size, device=x.device, dtype=torch.int32)


@draw_keys.register_fake
def _(x, number=1):
    return x.new_empty(number, 2, 1, dtype=torch.int32)


def scramble(x):
    """What is between the ends of "lowbias32" of int32 numbers, one to one."""
    x = x * 0x7FEB352D
    return (x ^ (x >> 15 & 0x1FFFF)) * (0x846CA68B - 2**32)
