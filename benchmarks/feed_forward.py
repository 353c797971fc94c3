"""Time and error of a layer's feed-forward branch in inference, by its kernel and by PyTorch.

    python benchmarks/feed_forward.py
    python benchmarks/feed_forward.py --d_model 256 --d_ffn 2048 --batches 64x400

x + 1/2 FFN(norm(x)) under autocast, x in float32, weights of products cast before, as in a pass of
`--compile`; with and without the norm that closes a layer. A batch is utterances x frames. On a GPU
PyTorch is compiled, and replays of CUDA graphs are timed: what the kernels take, without their
launches. off is the largest difference from float64, relative to the largest number that the branch
adds, or that the closing norm gives. The last line is everything as JSON.
"""

import argparse
import copy
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import measure
from modules.command import count, plain_errors
from modules.compilation import OPTIONS
from modules.encoder_layer import FeedForward
from modules.ops import kernels
from modules.ops.backends import OK
from modules.ops.feed_forward import residual_feed_forward


def branch(x, norm, ffn, closing):
    y = x + 0.5 * ffn(norm(x))
    return y if closing is None else closing(y)


def by_kernel(x, norm, ffn, closing):
    return residual_feed_forward(x, norm, ffn[0], ffn[3], closing, scale=0.5)


def make(batch, closes, options):
    """-> x, norm, ffn, closing"""
    torch.manual_seed(0)
    norm, closing = nn.LayerNorm(options.d_model), nn.LayerNorm(options.d_model)
    ffn = FeedForward(options.d_model, options.d_ffn, nn.GELU, dropout=0.0)
    ffn.to(getattr(torch, options.dtype))
    modules = [m.to(options.device).eval() for m in (norm, ffn, closing)]
    x = torch.randn(*batch, options.d_model, device=options.device)
    return x, *modules[:2], modules[2] if closes else None


def measure_branch(function, inputs, options):
    """-> {"ms", "warm_up_s", "off"}"""
    device, dtype = options.device, getattr(torch, options.dtype)

    def call():
        with torch.no_grad(), torch.autocast(device, dtype, cache_enabled=False):
            return function(*inputs)

    x, *modules = inputs
    with torch.no_grad():
        exact = branch(x.double(), *(m and copy.deepcopy(m).double() for m in modules))
    size = (exact if modules[2] else exact - x).abs().max()
    off = ((call() - exact).abs().max() / size).item()
    timed = measure.time_replays if device == "cuda" else measure.time_calls
    return {**timed(call, device, options.repeats, limit=options.limit), "off": off}


def shape(text):
    batch, frames = text.split("x")
    return int(batch), int(frames)


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--batches", nargs="+", type=shape, default=[(32, 400), (1, 400)], metavar="NxT"
    )
    parser.add_argument("--d_model", type=count, default=144)
    parser.add_argument("--d_ffn", type=count, default=1024)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--device", default=measure.best_device(), choices=["cuda", "cpu"])
    parser.add_argument("--repeats", type=count, default=100)
    parser.add_argument("--limit", type=float, default=1.0, help="seconds a timing may take")
    return parser.parse_args()


def main():
    options = parse()
    pytorch = branch
    if options.device == "cuda":
        pytorch = torch.compile(branch, dynamic=True, options=OPTIONS)
    functions = {"pytorch": pytorch}
    if kernels.availability() == OK:
        functions["kernel"] = by_kernel
    table = measure.Table({"batch": "<8", "closes": "<6", "by": "<8", "ms": ">9.4f",
                           "warm_up_s": ">9.2f", "off": ">9.1e"})  # fmt: skip
    for batch in options.batches:
        for closes in (False, True):
            inputs = make(batch, closes, options)
            for name, function in functions.items():
                row = {"batch": "{}x{}".format(*batch), "closes": closes, "by": name}
                table.add(row | measure.attempt(measure_branch, function, inputs, options))
    more = vars(options)
    measure.print_report("feed_forward", more.pop("device"), table.rows, **more)


if __name__ == "__main__":
    with plain_errors():
        main()
