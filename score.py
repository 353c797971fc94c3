#!/usr/bin/env python3
"""Score a packaged model against transcripts: python score.py DATA... --model DIR"""

import sys
import tempfile
from pathlib import Path

from inference.listener import check_batch_size
from inference.report.alignments import read_alignments
from inference.scoring import hear, read, summary, write
from inference.windows import limits
from modules.command import argument_parser, plain_errors
from modules.errors import UserError
from transcribe import add_model_options, load

EXAMPLES = """
examples:
  python score.py LibriSpeech/test-clean LibriSpeech/test-other --model packages/conmamba
  python score.py mine.csv --model packages/conmamba --beam 50 --lm 4-gram.arpa
  python score.py LibriSpeech/test-clean --model conmamba.onnx --output scores/onnx
  python -m inference.report scores/onnx    # errors by word, speaker and length

DATA is a folder in LibriSpeech layout (recordings beside *.trans.txt) or a manifest, .csv or .jsonl
(docs/training.md), and its name is that of the test set. Words are compared as they are written:
transcripts must be spelt as the model spells, for the shipped CTC recipes in capital letters.

Behind each rate, in percent, stands its 95 % interval by bootstrap over the utterances. --output
keeps wer_<test set>.txt, in SpeechBrain's format with alignments.

exit status: 0 all scored; 1 some recordings or transcripts could not be used, and are named; 2
nothing was scored, for a mistake in the command line, the data or the package.
"""


def parser():
    p = argument_parser("Error rates of a packaged model on recordings with transcripts.", EXAMPLES)
    p.add_argument("data", nargs="+", metavar="DATA", help="folder with transcripts, or manifest")
    add_model_options(p)
    p.add_argument("--output", metavar="DIR", help="keep wer_<test set>.txt here")
    return p


def main():
    arguments = parser().parse_args()
    with plain_errors(), tempfile.TemporaryDirectory(prefix="score-") as scratch:
        left_out = run(arguments, Path(arguments.output or scratch))
    sys.exit(1 if left_out else 0)


def run(arguments, folder):
    """Score all test sets; returns how many utterances could not be used."""
    check_batch_size(arguments.batch_size)
    limits(arguments.chunk_seconds)
    reports = read(arguments.data)
    recognizer = load(arguments)
    folder.mkdir(parents=True, exist_ok=True)
    unheard = []
    for report in reports:
        try:
            texts = hear(recognizer, report, arguments.batch_size, arguments.chunk_seconds)
        except UserError as error:  # the other sets are scored
            unheard.append(error)
            continue
        path = folder / f"wer_{report.split}.txt"
        write(path, report.usable, texts)
        print(summary(report.split, read_alignments(path)), flush=True)
        for line in report.lines(examples=3):
            print(line, file=sys.stderr)
    if len(unheard) == len(reports):
        raise unheard[0]
    for error in unheard:
        print(f"error: {error}", file=sys.stderr)
    return sum(len(report.faults) for report in reports)


if __name__ == "__main__":
    main()
