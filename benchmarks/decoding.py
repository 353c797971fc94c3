"""Joint beam search: Mamba against Transformer decoder, with and without CTC, and by length.

    python benchmarks/decoding.py
    python benchmarks/decoding.py --precision bf16 --reference
    python benchmarks/decoding.py --device cpu --size small --tokens 10

Random weights of the shipped S2S recipes' sizes and noise for the encoder's output. Every search
takes exactly --tokens tokens, since eos comes neither early nor late. A row is the median of whole
searches, the reading of the memory included. On a GPU the Mamba decoder's are replayed as CUDA
graphs, which the first search of a shape has recorded.
The rows of --lengths show how the cost of a token grows with the number of tokens.
--reference adds SpeechBrain's search over the same decoders, which the tests compare with.
The last line is everything as JSON.
"""

import argparse
import sys
from pathlib import Path

import torch
from hyperpyyaml import load_hyperpyyaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import measure
from modules.command import count, plain_errors
from modules.search import JointBeamSearch

RECIPES = {"mamba": "conmambamamba", "transformer": "conmamba"}
COLUMNS = {
    "model": "<42",
    "tokens": ">6",
    "ms": ">10.2f",
    "ms_per_token": ">12.3f",
    "peak_gb": ">8.2f",
}


def load_parts(decoder, size, device):
    """Decoder, token head and CTC head of a shipped recipe, with random weights."""
    path = measure.ROOT / f"hparams/S2S/{RECIPES[decoder]}_{size}.yaml"
    with open(path, encoding="utf-8") as file:
        hparams = load_hyperpyyaml(file)
    parts = [hparams[name].to(device).eval() for name in ("decoder", "seq_head", "ctc_head")]
    with torch.no_grad():
        parts[1].bias[hparams["eos_index"]] = -100.0
    return parts, hparams


def make_search(kind, decoder, parts, hparams, ctc, tokens, options):
    return kind(
        *parts,
        beam_size=options.beam,
        ctc_weight=ctc,
        temperature=hparams["temperature"],
        # Half a token more, for the product with the number of frames is rounded down.
        max_decode_ratio=(tokens + 0.5) / options.frames,
    )


def time_search(search, memory, lengths, tokens, options):
    """-> {"ms", "warm_up_s", "ms_per_token", "peak_gb"}"""
    precision = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[options.precision]
    found = []

    def run():
        device = torch.device(options.device).type
        with torch.autocast(device, dtype=precision, enabled=precision is not None):
            found[:] = search(memory, lengths)[0]

    times = measure.time_calls(run, options.device, options.repeats, 2, options.limit)
    peak = measure.peak_bytes(run, options.device, above=True)
    assert all(len(hypothesis) == tokens for hypothesis in found), "the search was not as long"
    return {
        **times,
        "ms_per_token": round(times["ms"] / tokens, 4),
        "peak_gb": measure.rounded(peak, 1e9, 2),
    }


def measure_decoder(decoder, table, options):
    """All rows of one decoder."""
    parts, hparams = load_parts(decoder, options.size, options.device)
    torch.manual_seed(0)
    shape = (options.batch, options.frames, hparams["d_model"])
    memory = torch.randn(*shape, device=options.device)
    lengths = torch.full((options.batch,), options.frames, device=options.device)
    kinds = {"ours": JointBeamSearch}
    if options.reference:
        from tests.search.reference import ReferenceSearch

        kinds["speechbrain"] = ReferenceSearch
    weights = (hparams["ctc_weight_decode"], 0.0)
    cases = [(name, ctc, options.tokens) for name in kinds for ctc in weights]
    cases += [("ours", ctc, n) for ctc in weights for n in options.lengths if n != options.tokens]
    for name, ctc, tokens in cases:
        search = make_search(kinds[name], decoder, parts, hparams, ctc, tokens, options)
        row = measure.attempt(time_search, search, memory, lengths, tokens, options)
        about = {"decoder": decoder, "search": name, "ctc": ctc, "tokens": tokens}
        table.add({"model": describe(**about), **about, **row})
        del search  # and its graphs
        measure.free()


def describe(decoder, search, ctc, tokens):
    """What a line of a figure is called."""
    other = ", SpeechBrain's search" if search == "speechbrain" else ""
    return f"{decoder.capitalize()} decoder{' with CTC' if ctc else ''}{other}"


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    device = measure.best_device()
    parser.add_argument("--device", default=device, help="cuda or cpu")
    parser.add_argument("--size", choices=["large", "small", "tiny"])
    parser.add_argument("--decoders", nargs="+", default=list(RECIPES), choices=RECIPES)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--batch", type=count, default=8)
    parser.add_argument("--beam", type=count, default=10)
    parser.add_argument("--frames", type=count, help="of the memory; 25 a second")
    parser.add_argument("--tokens", type=count)
    parser.add_argument("--lengths", type=int, nargs="*")
    parser.add_argument("--reference", action="store_true", help="SpeechBrain's search too")
    parser.add_argument("--repeats", type=count, default=10)
    parser.add_argument("--limit", type=float, default=6.0, help="seconds a row, roughly")
    options = parser.parse_args()
    cuda = torch.device(options.device).type == "cuda"
    defaults = {
        "size": ("small", "large"),
        "frames": (100, 400),
        "tokens": (10, 50),
        "lengths": ([5, 10, 20, 40], [10, 25, 50, 100, 200]),
    }
    for name, values in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, values[cuda])
    return options


def main():
    options = parse()
    table = measure.Table(COLUMNS)
    for decoder in options.decoders:
        measure_decoder(decoder, table, options)
        measure.release()
    settings = {k: v for k, v in vars(options).items() if k not in ("device", "decoders")}
    measure.print_report("decoding", options.device, table.rows, **settings)


if __name__ == "__main__":
    with plain_errors():
        main()
