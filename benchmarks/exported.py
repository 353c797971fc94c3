#!/usr/bin/env python3
"""Size, error rate and speed of packages and exported files, on the CPU.

python benchmarks/exported.py packages/conmamba conmamba.onnx --data LibriSpeech/test-clean
"""

import argparse
import sys
import time
from pathlib import Path

import soundfile as sf
import torch
from speechbrain.utils.edit_distance import accumulatable_wer_stats
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import measure
from inference import Recognizer
from inference.onnx import OnnxRecognizer
from modules.command import count, plain_errors

COLUMNS = {
    "model": "<28",
    "megabytes": ">10.3f",
    "wer": ">8.2f",
    "cpu_per_second": ">14.5f",
    "texts_as_the_first": ">18",
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", help="packages, and files of export.py --to onnx")
    parser.add_argument("--data", required=True, metavar="DIR", help="a split, LibriSpeech layout")
    parser.add_argument("--threads", type=count, default=1, metavar="N", help="(1)")
    parser.add_argument("--repeats", type=count, default=3, metavar="N", help="the best counts (3)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    utterances = split(Path(options.data))
    table, first = measure.Table(COLUMNS), None
    for model in options.models:
        row, texts = row_of(Path(model), utterances, options)
        first = first or texts
        row["texts_as_the_first"] = sum(a == b for a, b in zip(texts, first, strict=True))
        table.add(row)
    seconds = round(sum(len(x) / rate for x, rate, _ in utterances), 1)
    about = {"utterances": len(utterances), "seconds": seconds, "threads": options.threads}
    measure.print_report("exported", "cpu", table.rows, **about)


def split(folder):
    """[(samples, rate, transcript)] of a split, by its utterances' names."""
    found = []
    for file in sorted(folder.rglob("*.trans.txt")):
        for line in file.read_text().splitlines():
            name, _, text = line.partition(" ")
            found.append((*sf.read(file.with_name(f"{name}.flac"), dtype="float32"), text))
    if not found:
        sys.exit(f"error: {folder} holds no *.trans.txt; give a split in LibriSpeech layout")
    return found


def row_of(model, utterances, options):
    """A model's row, and its texts.

    cpu_per_second : seconds of the processor for a second of sound, for features, encoder and CTC
    head, utterance by utterance; no other program's work counts
    """
    if model.is_dir():
        recognizer = Recognizer.from_folder(model, "cpu")
        encode, size = by_pytorch(recognizer), (model / "model.ckpt").stat().st_size
    else:
        recognizer = OnnxRecognizer.from_file(model, threads=options.threads)
        encode, size = recognizer.log_probs, model.stat().st_size
    signals = [x for x, _, _ in utterances]
    seconds = sum(len(x) / rate for x, rate, _ in utterances)
    fastest = float("inf")
    for _ in range(options.repeats):
        start = time.process_time()
        for x in tqdm(signals, disable=None, leave=False, file=sys.stderr):
            encode([x])
        fastest = min(fastest, time.process_time() - start)
    texts = [recognizer.transcribe(x, rate).text for x, rate, _ in utterances]
    references = [text.split() for *_, text in utterances]
    counts = accumulatable_wer_stats(references, [text.split() for text in texts])
    row = {
        "model": model.name,
        "megabytes": round(size / 1e6, 3),
        "wer": round(counts["WER"], 2),
        "words": counts["num_ref_tokens"],
        "cpu_per_second": round(fastest / seconds, 5),
    }
    return row, texts


def by_pytorch(recognizer):
    """Signals of one utterance -> log-probabilities, features included, as the exported file's."""

    @torch.no_grad()
    def encode(signals):
        x, _ = recognizer._encode([torch.from_numpy(s) for s in signals])
        return recognizer.model["ctc_head"](x).log_softmax(-1)

    return encode


if __name__ == "__main__":
    with plain_errors():
        main()
