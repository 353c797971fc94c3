"""The state-space dual by matrix products, in plain PyTorch (Dao & Gu 2024, section 6).

Time is cut into chunks. Within one, y = (decays * C B') (dt x): attention without a softmax, whose
mask holds the decay from each frame to each later one. Chunks hand on a state, and what the
states before them add to y is one more product.

Nothing is ever divided by a product of decays, nor are sums of their logarithms subtracted: every
factor is exp of a sum of dt A over the frames between, so any dt and A are safe. On CUDA float32
products may be TF32's, as in any layer.
"""

import torch
from torch.nn import functional as F  # noqa: N812

from modules.ops.backends import OK, Call

GROUP = 64  # chunks that get their states by one product


def availability() -> str:
    return OK


def supports(call: Call) -> str:
    return OK


def state_space_dual(x, dt, A, B, C, h):
    """As `naive.state_space_dual`; the products of bfloat16 inputs are bfloat16."""
    frames, size = x.shape[1], chunk_frames(x.device.type)
    if torch.compiler.is_compiling():
        # A size that is a length takes minutes to trace; no padding would be a graph of its own.
        chunks = frames // size + 1
    else:
        size = min(size, frames)
        chunks = -(-frames // size)
    product = x.dtype if x.dtype == torch.bfloat16 else h.dtype
    x = (dt.unsqueeze(3) * x).to(product)
    x, log_decay, B, C = (
        _chunks(t, chunks, size) for t in (x, dt * A, B.to(product), C.to(product))
    )
    between = decays(log_decay.transpose(2, 3))  # (B, chunks, H, size, size)
    to_end = between[..., -1, :].transpose(2, 3)  # (B, chunks, size, H)
    from_start = log_decay.cumsum(2).exp()

    scores = torch.matmul(C, B.transpose(2, 3)).unsqueeze(2)
    y = torch.matmul((scores * between).to(product), x.transpose(2, 3)).transpose(2, 3)
    added = (to_end.unsqueeze(4) * x).to(product).flatten(3)
    added = torch.matmul(B.transpose(2, 3), added).to(h.dtype)  # (B, chunks, N, H P)
    starts, h = _carry(added.unflatten(3, h.shape[1:3]), log_decay.sum(2), h)
    carried = torch.matmul(C, starts.to(product).flatten(3)).unflatten(3, h.shape[1:3])
    y = y + from_start.unsqueeze(4) * carried
    return y.flatten(1, 2)[:, :frames], h


def chunk_frames(device):
    """Frames of a chunk: few on a CPU, whose time goes to the masks; on others wide products."""
    return 32 if device == "cpu" else 64


def decays(log_decay):
    """(..., n) -> (..., n, n): [i, j] = exp(sum of log_decay over j < k <= i), 0 where j > i."""
    size = log_decay.shape[-1]
    sums = log_decay.unsqueeze(-1).expand(*log_decay.shape, size).tril(-1).cumsum(-2)
    return sums.exp().tril()


def _chunks(t, chunks, size):
    """(B, T, ...) -> (B, chunks, size, ...), zeros after the end, which leave a state alone."""
    spare = chunks * size - t.shape[1]
    return F.pad(t, (0, 0) * (t.dim() - 2) + (0, spare)).unflatten(1, (chunks, size))


def _carry(added, log_decay, h):
    """What each chunk starts from: added (B, chunks, N, H, P), log_decay (B, chunks, H), h.

    h (B, H, P, N) -> (B, chunks, N, H, P), the state at the end as h.
    """
    starts, h = [], h.permute(0, 3, 1, 2)
    for group, logs in zip(added.split(GROUP, 1), log_decay.split(GROUP, 1), strict=True):
        weights = decays(F.pad(logs, (0, 0, 1, 0)).transpose(1, 2))  # (B, H, chunks + 1, the same)
        states = torch.cat([h.unsqueeze(1), group], dim=1)
        states = torch.einsum("bhij,bjnhp->binhp", weights, states)
        starts.append(states[:, :-1])
        h = states[:, -1]
    return torch.cat(starts, dim=1), h.permute(0, 2, 3, 1)
