"""Language models in a search: the time for scoring, as hypotheses grow.

    python benchmarks/language_models.py
    python benchmarks/language_models.py --tokens 25 100 --hypotheses 66 --device cuda

A search of so many hypotheses and tokens asks for the next tokens' scores and reorders, token by
token. seconds are CPU time of one thread, or on CUDA the clock's, of the faster of two searches.

The last line is everything as JSON.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from speechbrain.lobes.models.transformer.TransformerLM import TransformerLM
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from modules.command import count, plain_errors
from modules.lm.mamba_lm import MambaLM
from modules.search.language import start_language_model


def models(vocab, d_model, layers):
    """{name: model} of one width and depth."""
    sizes = {"d_model": d_model, "d_ffn": 4 * d_model, "dropout": 0.0, "activation": nn.GELU}
    return {
        "transformer": TransformerLM(vocab, nhead=4, num_encoder_layers=layers, **sizes),
        "mamba": MambaLM(vocab, num_layers=layers, **sizes),
    }


@torch.no_grad()
def search(lm, hypotheses, tokens, device):
    """Seconds that the language model takes in one search."""
    clock = time.perf_counter if device.startswith("cuda") else time.process_time
    scorer = start_language_model(lm, 1.0, 1.0, hypotheses)
    same = torch.arange(hypotheses, device=device)
    started = clock()
    for _ in range(tokens):
        scores = scorer.score(torch.ones_like(same))
        scorer.reorder(same)
    scores.sum().item()
    return clock() - started


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--tokens", type=count, nargs="+", default=[25, 100, 200])
    p.add_argument("--hypotheses", type=count, default=10)
    p.add_argument("--vocab", type=count, default=1000)
    p.add_argument("--d_model", type=count, default=256)
    p.add_argument("--layers", type=count, default=6)
    p.add_argument("--device", default="cpu")
    options = p.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name, lm in models(options.vocab, options.d_model, options.layers).items():
        lm = lm.eval().to(options.device)
        millions = sum(p.numel() for p in lm.parameters()) / 1e6
        for tokens in options.tokens:
            arguments = lm, options.hypotheses, tokens, options.device
            seconds = min(search(*arguments) for _ in range(2))
            rows.append({"model": name, "tokens": tokens, "seconds": round(seconds, 3)})
            print(f"{name:<12} {millions:6.2f} M {tokens:5d} tokens {seconds:9.3f} s")
    print(json.dumps({**vars(options), "rows": rows}))


if __name__ == "__main__":
    with plain_errors():
        main()
