"""One mixer layer, forward and with backward: state-space models against attention.

    python benchmarks/mixers.py
    python benchmarks/mixers.py --shapes 32x400 --mixers BiMamba flash-attention
    python benchmarks/mixers.py --device cpu --precision fp32 --d_model 64 --shapes 2x50

A shape is utterances x frames; all utterances have the full length. forward_ms is without
gradients; forward_backward_ms and peak_mb are of a forward and a backward pass, peak_mb above
parameters and input; ratio is forward_backward_ms over the first mixer's. Parameters are float32,
the work is done under bf16 autocast. --compile compiles each mixer, with
training's options but for its one shape.

    BiMamba, Mamba         modules.mamba
    BiMamba2, Mamba2       modules.mamba2, with its own 64 states a channel
    RelPos, RoPE           modules.attention, as in this project's Conformer
    speechbrain-relpos     SpeechBrain's RelPosMHAXL, without a padding mask
    speechbrain-rope       SpeechBrain's RoPEMHA, without a padding mask: flash attention
    flash-attention        two projections around scaled_dot_product_attention, no positions:
                           the least that self-attention can cost

The last line is everything as JSON.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import measure
from modules.attention import RelPosAttention, RoPEAttention
from modules.command import count, plain_errors
from modules.compilation import OPTIONS
from modules.mamba import BiMamba, Mamba
from modules.mamba2 import BiMamba2, Mamba2


class FlashAttention(nn.Module):
    """Self-attention and nothing else: (B, T, D) -> (B, T, D)."""

    def __init__(self, d_model, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.in_proj = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out_proj = nn.Linear(d_model, d_model)

    def forward(self, x, lengths):
        qkv = self.in_proj(x).unflatten(-1, (3, self.num_heads, -1)).transpose(1, 3)
        y = F.scaled_dot_product_attention(*qkv.unbind(2))  # (B, H, T, D / H)
        return self.out_proj(y.transpose(1, 2).flatten(2)), None


class SpeechBrainAttention(nn.Module):
    """A mixer of SpeechBrain behind this project's signature."""

    def __init__(self, attention, positions=None):
        super().__init__()
        self.attention, self.positions = attention, positions

    def forward(self, x, lengths):
        pos_embs = None if self.positions is None else self.positions(x)
        return self.attention(x, x, x, pos_embs=pos_embs, return_attn_weights=False), None


def speechbrain_relpos(d_model, num_heads):
    from speechbrain.nnet.attention import RelPosEncXL, RelPosMHAXL

    return SpeechBrainAttention(RelPosMHAXL(d_model, num_heads), RelPosEncXL(d_model))


def speechbrain_rope(d_model, num_heads):
    # Imported here, so that a SpeechBrain without it fails in its row alone.
    from speechbrain.nnet.attention import RoPEMHA

    return SpeechBrainAttention(RoPEMHA(d_model, num_heads))


MIXERS = {
    "BiMamba": lambda d_model, num_heads: BiMamba(d_model),
    "Mamba": lambda d_model, num_heads: Mamba(d_model),
    "BiMamba2": lambda d_model, num_heads: BiMamba2(d_model),
    "Mamba2": lambda d_model, num_heads: Mamba2(d_model),
    "RelPos": RelPosAttention,
    "RoPE": RoPEAttention,
    "speechbrain-relpos": speechbrain_relpos,
    "speechbrain-rope": speechbrain_rope,
    "flash-attention": FlashAttention,
}


def measure_mixer(name, batch, frames, options):
    """-> {"forward_ms", "forward_backward_ms", "peak_mb"}"""
    device = options.device
    torch.manual_seed(0)
    mixer = MIXERS[name](options.d_model, options.num_heads).to(device)
    dtype = getattr(torch, options.input)
    x = torch.randn(batch, frames, options.d_model, device=device).to(dtype).requires_grad_()
    lengths = torch.full((batch,), frames, device=device)
    if options.compile:
        mixer.compile(dynamic=False, options=OPTIONS | getattr(mixer, "compile_options", {}))
    inputs = [x, *(p for p in mixer.parameters() if p.requires_grad)]
    autocast = torch.autocast(
        torch.device(device).type, torch.bfloat16, enabled=options.precision == "bf16"
    )

    def forward():
        with autocast:
            return mixer(x, lengths)[0]

    dy = torch.randn_like(forward())

    def forward_without_gradients():
        with torch.no_grad():
            forward()

    def forward_backward():
        torch.autograd.grad(forward(), inputs, dy, allow_unused=True)

    forward_backward()
    peak = measure.peak_bytes(forward_backward, device, above=True)  # graphs keep memory of theirs
    timed = measure.time_replays if options.graph else measure.time_calls
    settings = {"repeats": options.repeats, "limit": options.limit, "clock": options.clock}
    both = timed(forward_backward, device, **settings)
    alone = timed(forward_without_gradients, device, **settings)
    return {
        "forward_ms": alone["ms"],
        "forward_backward_ms": both["ms"],
        "peak_mb": measure.rounded(peak, 1e6, 1),
    }


def shape(text):
    """'32x400' -> (32, 400)"""
    batch, frames = text.split("x")
    return int(batch), int(frames)


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mixers", nargs="+", default=list(MIXERS), choices=list(MIXERS))
    parser.add_argument("--shapes", nargs="+", type=shape, default=[(32, 400), (1, 12000)])
    parser.add_argument("--d_model", type=count, default=512)
    parser.add_argument("--num_heads", type=count, default=8)
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--input", default="float32", choices=["float32", "bfloat16"],
                        help="type of the layer's input; a LayerNorm under autocast gives "
                        "float32")  # fmt: skip
    parser.add_argument("--device", default=measure.best_device())
    parser.add_argument("--rounds", type=count, default=1, help="all mixers in turn, so often; of "
                        "each number the least: for a busy machine")  # fmt: skip
    parser.add_argument("--clock", default="wall", choices=measure.CLOCKS, help=measure.CLOCK_HELP)
    parser.add_argument("--graph", action="store_true", help=measure.GRAPH_HELP)
    parser.add_argument("--compile", action="store_true", help="torch.compile, of every mixer")
    parser.add_argument("--repeats", type=count, default=50)
    parser.add_argument("--limit", type=float, default=2.0, help="seconds a timing")
    return parser.parse_args()


def main():
    options = parse()
    table = measure.Table(
        {
            "mixer": "<18",
            "shape": "<9",
            "forward_ms": ">10.3f",
            "forward_backward_ms": ">19.3f",
            "peak_mb": ">9.1f",
            "ratio": ">6.2f",
        }
    )
    for batch, frames in options.shapes:
        calls = {
            name: partial(measure_mixer, name, batch, frames, options) for name in options.mixers
        }
        first = None
        for name, row in measure.in_turn(calls, options.rounds):
            first = first or row.get("forward_backward_ms")
            if "error" not in row and first:
                row["ratio"] = round(row["forward_backward_ms"] / first, 3)
            table.add({"mixer": name, "shape": f"{batch}x{frames}", **row})
    measure.print_report(
        "mixers",
        options.device,
        table.rows,
        d_model=options.d_model,
        precision=options.precision,
        input=options.input,
        rounds=options.rounds,
        clock=options.clock,
        graph=options.graph,
        compile=options.compile,
    )


if __name__ == "__main__":
    with plain_errors():
        main()
