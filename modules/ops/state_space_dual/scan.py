"""The state-space dual by the selective scan, of which it is a case: all of a head decay alike.

For exported graphs, whose scan it is then, and to compare with.
"""

from modules.ops.backends import OK, Call
from modules.ops.selective_scan import selective_scan


def availability() -> str:
    return OK


def supports(call: Call) -> str:
    return OK


def state_space_dual(x, dt, A, B, C, h):
    """As `naive.state_space_dual`."""
    heads, channels, states = h.shape[1:]
    dt = dt.unsqueeze(3).expand(-1, -1, -1, channels).flatten(2)
    A = A.view(-1, 1, 1).expand(-1, channels, states).flatten(0, 1)
    y, h = selective_scan(
        x.to(h.dtype).flatten(2), dt, A, B, C, initial_state=h.flatten(1, 2), return_state=True
    )
    return y.unflatten(2, (heads, channels)), h.unflatten(1, (heads, channels))
