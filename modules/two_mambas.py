"""Two directions that share nothing, to be compared with `modules.mamba.BiMamba`."""

from torch import nn
from torch.nn import functional as F  # noqa: N812

from modules.mamba import BiMamba, run_in_chunks


class TwoMambas(BiMamba):
    """Bidirectional mixer: the mean of two `Mamba`, one of them backwards.

    As `BiMamba`, but each direction has an in_proj and an out_proj of its own, and so its gate:
    out = 1/2 (out_proj_f(y_forward silu(z_f)) + out_proj_b(y_backward silu(z_b))).
    """

    def __init__(self, d_model, d_state=16, expand=2, d_conv=4):
        super().__init__(d_model, d_state, expand, d_conv)
        self.backward_in_proj = nn.Linear(d_model, 2 * expand * d_model, bias=False)
        self.backward_out_proj = nn.Linear(expand * d_model, d_model, bias=False)

    def forward(self, x, lengths, state=None, chunk=None):
        """As `BiMamba.forward`."""
        x_forward, z_forward = self.in_proj(x).chunk(2, dim=-1)
        x_backward, z_backward = self.backward_in_proj(x).chunk(2, dim=-1)
        if chunk is None:
            assert state is None, "TwoMambas runs in pieces only if it is told the chunk"
            y_forward, _ = self.forward_ssm(x_forward, lengths, z=z_forward)
            y_backward, _ = self.backward_ssm(x_backward, lengths, z=z_backward)
        else:
            directions = self.forward_ssm, self.backward_ssm, x_forward, x_backward
            (y_forward, y_backward), state = run_in_chunks(*directions, lengths, state, chunk)
            frames = y_forward.shape[1]
            y_forward = y_forward * F.silu(z_forward[:, :frames])
            y_backward = y_backward * F.silu(z_backward[:, :frames])
        return 0.5 * (self.out_proj(y_forward) + self.backward_out_proj(y_backward)), state
