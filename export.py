#!/usr/bin/env python3
"""Export a packaged model to another runtime: python export.py --model DIR --to onnx"""

import sys
from pathlib import Path

from inference.export import TARGETS, export, not_exported
from modules.command import argument_parser, plain_errors

EXAMPLES = """
examples:
  python export.py --model packages/conmamba --to onnx
  python transcribe.py speech.flac --model conmamba.onnx    # without PyTorch installed, too
  python export.py --model packages/conmamba --to onnx --int8 --output small.onnx
  python export.py --model packages/causal --to onnx --streaming
  python export.py --model packages/conmamba --to torch-export

DIR is a package: python package.py OUTPUT_FOLDER --output DIR makes one from a training.

  onnx          .onnx       onnxruntime and others; the scan is ONNX's Scan
  torch-export  .pt2        torch.export.load, without this repository's code
  torchscript   .ts         torch.jit.load and C++ (legacy in PyTorch)
  coreml        .mlpackage  macOS and iOS

What is exported is normalisation, frontend, encoder and CTC head, of an S2S model too: features
(B, T, n_mels) and lengths (B,), both sizes free, to log-probabilities and their lengths. The file
says of itself what a program needs to use it, as JSON: features, vocabulary, sample rate, states.
A decoder is not exported.

The file is compared with the model in PyTorch at several sizes, lengths and paddings, and kept only
if it computes the same. docs/export.md has the limits, the inputs and outputs, and measurements.

exit status: 0 exported; 2 not, and nothing was written.
"""


def main():
    parser = argument_parser(
        "Export a package's encoder and CTC head to one file for another runtime.", EXAMPLES
    )
    parser.add_argument(
        "--model", required=True, metavar="DIR", help="the package, or a name on the hub"
    )
    parser.add_argument("--to", required=True, choices=TARGETS, help="what reads the file")
    parser.add_argument(
        "--output", metavar="FILE", help="the file (named after DIR, in the working directory)"
    )
    parser.add_argument(
        "--int8", action="store_true", help="linear layers' weights as int8: a smaller file"
    )
    parser.add_argument(
        "--streaming",
        action="store_true",
        help="one step of a causal or chunked model, its states as inputs and outputs",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier file")
    arguments = parser.parse_args()
    if sys.stderr.isatty():
        print("exporting and checking; a large model takes minutes", file=sys.stderr)
    with plain_errors("interrupted; nothing is written", "nothing is written"):
        path, parity = export(
            arguments.model,
            arguments.to,
            arguments.output,
            arguments.int8,
            arguments.streaming,
            arguments.overwrite,
        )
        left = not_exported(arguments.model)
        print(f"wrote {path}, {size(path) / 1e6:.2f} MB; {parity}")
    if left:
        print(f"note: {left}", file=sys.stderr)


def size(path):
    """Bytes of a file, or of all files of a folder."""
    return sum(p.stat().st_size for p in [path, *Path(path).rglob("*")] if p.is_file())


if __name__ == "__main__":
    main()
