"""A word n-gram for the CTC search: python -m modules.lm.ngram TEXT... --output 3-gram.arpa"""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from tqdm import tqdm

from modules.command import argument_parser, plain_errors
from modules.errors import UserError
from modules.lm.arpa import Arpa, write_arpa
from modules.lm.kneser_ney import BOS, EOS, UNKNOWN, estimate
from modules.lm.text import files_of, read_sentences

EXAMPLES = """
examples:
  python -m modules.lm.ngram text/train-clean-100.txt --output 3-gram.arpa
  python -m modules.lm.ngram /data/LibriSpeech/train-clean-100 --output 3-gram.arpa \\
      --dev /data/LibriSpeech/dev-clean
  python -m modules.lm.ngram librispeech-lm-norm.txt.gz --order 4 --prune 0 0 1 --output 4-gram.bin

TEXT: files with a sentence a line or with transcripts (<id> WORDS), plain or gzipped, folders in
LibriSpeech layout, and manifests (.csv, .jsonl). The words must be written as the recogniser writes
them: for the shipped CTC recipes in capital letters.

KenLM's lmplz is used where it is on PATH. It is no part of the pip package: build it from KenLM's
sources with CMake. Without it the same estimate (interpolated modified Kneser-Ney) is made in
Python, in memory: good for some millions of words. A .bin needs KenLM's build_binary; give .arpa
where it is small enough, as the search knows from it which words begin how.

then:
  python tune.py results/CTC/conmamba_small/3402 --lm 3-gram.arpa   # its weights, by the dev set
  python train_CTC.py hparams/CTC/conmamba_small.yaml --data_folder /data/LibriSpeech \\
      --resume results/CTC/conmamba_small/3402 --output_folder results/3-gram --skip_train True \\
      --no_lm False --kenlm_model_path 3-gram.arpa --token_prune_min_logp -8
  python transcribe.py speech.flac --model DIR --lm 3-gram.arpa
"""


def parser():
    p = argument_parser(
        "Train a word n-gram from text and measure its perplexity.",
        EXAMPLES,
        "python -m modules.lm.ngram",
    )
    p.add_argument("text", nargs="+", metavar="TEXT", help="files or folders to learn from")
    p.add_argument("--output", required=True, metavar="FILE", help="the model, .arpa or .bin")
    p.add_argument("--order", type=int, default=3, metavar="N", help="words of an n-gram (3)")
    p.add_argument("--dev", nargs="+", metavar="TEXT", help="text to measure the perplexity of")
    p.add_argument(
        "--tool",
        choices=("auto", "lmplz", "python"),
        default="auto",
        help="what estimates: lmplz, or Python in memory (auto: lmplz where it is installed)",
    )
    p.add_argument(
        "--prune",
        nargs="+",
        metavar="COUNT",
        help="lmplz's --prune: drop n-grams seen so often or less, a number an order",
    )
    p.add_argument("--overwrite", action="store_true", help="replace an earlier model")
    return p


def main(argv=None):
    arguments = parser().parse_args(argv)
    with plain_errors("interrupted; nothing was written", "nothing was written"):
        run(arguments)


def run(arguments):
    output, tool = Path(arguments.output), tool_of(arguments)
    for path in [*arguments.text, *(arguments.dev or [])]:  # before minutes of work
        files_of(Path(path), "TEXT")
    output.parent.mkdir(parents=True, exist_ok=True)
    text = tqdm(
        checked(read_sentences(arguments.text, "TEXT")),
        unit=" sentences",
        disable=None,
        leave=False,
    )
    with tempfile.TemporaryDirectory(prefix=".ngram-", dir=output.parent) as scratch:
        arpa = Path(scratch) / "n-gram.arpa"
        if tool == "lmplz":
            run_lmplz(text, arpa, arguments.order, arguments.prune, scratch)
        else:
            write_arpa(estimate(text, arguments.order), arpa)
        counts = counts_of(arpa)
        made = arpa if output.suffix == ".arpa" else run_build_binary(arpa)
        if arguments.dev:
            report(Arpa(arpa), arguments.dev)
        os.replace(made, output)
    print(f"wrote {output}, made by {tool}: {', '.join(counts)} n-grams of 1, 2, ... words")


def tool_of(arguments):
    """lmplz or python; UserError for what cannot be done with it, before any text is read."""
    output = Path(arguments.output)
    if output.suffix not in (".arpa", ".bin"):
        raise UserError(f"--output {output}: the name must end in .arpa or .bin")
    if output.exists() and not arguments.overwrite:
        raise UserError(f"{output} exists; give --overwrite, or another --output")
    if not 2 <= arguments.order <= 6:
        raise UserError(f"--order {arguments.order}: KenLM reads 2 to 6; 3 or 4 is usual")
    remedy = "build KenLM from its sources with CMake and put its folder bin on PATH"
    installed = shutil.which("lmplz") is not None
    if arguments.tool == "lmplz" and not installed:
        raise UserError(f"--tool lmplz: it is not on PATH; {remedy}, or give --tool python")
    if output.suffix == ".bin" and shutil.which("build_binary") is None:
        raise UserError(
            f"--output {output}: KenLM's build_binary is not on PATH; {remedy}, or write an .arpa"
        )
    tool = arguments.tool
    if tool == "auto":
        tool = "lmplz" if installed else "python"
    if arguments.prune and tool != "lmplz":
        raise UserError(
            f"--prune {' '.join(arguments.prune)} needs lmplz; {remedy}, or leave it out"
        )
    return tool


def checked(sentences):
    """The sentences; UserError for a word that means something else in an n-gram."""
    for sentence in sentences:
        for word in (BOS, EOS, UNKNOWN):
            if word in sentence.split():
                raise UserError(f"the text has the word {word} in {sentence!r}; take it out")
        yield sentence


def run_lmplz(sentences, arpa, order, prune, scratch):
    """Estimate by KenLM's tool."""
    command = ["lmplz", "-o", str(order), "--arpa", str(arpa), "-T", f"{scratch}/"]
    # The discounts of a text that is too small to measure them, as without the tool.
    command += ["--discount_fallback", *(["--prune", *prune] if prune else [])]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log)
        try:
            with process.stdin as stdin:
                for sentence in sentences:
                    stdin.write(f"{sentence}\n".encode())
        except BrokenPipeError:  # it says why
            pass
        except BaseException:
            process.kill()
            process.wait()
            raise
        if process.wait():
            log.seek(0)
            last = log.read().decode(errors="replace").strip().splitlines()[-3:]
            raise UserError(f"lmplz failed: {' '.join(last)}")


def run_build_binary(arpa):
    """The same model in KenLM's own format."""
    binary = arpa.with_suffix(".bin")
    done = subprocess.run(
        ["build_binary", str(arpa), str(binary)], capture_output=True, text=True, errors="replace"
    )
    if done.returncode:
        raise UserError(f"build_binary failed: {done.stderr.strip()[-300:]}")
    return binary


def counts_of(arpa):
    """How many n-grams there are of each order, as text."""
    counts = []
    with open(arpa, encoding="utf-8") as file:
        for line in file:
            if line.startswith("ngram "):
                counts.append(f"{int(line.partition('=')[2]):,}")
            elif line.startswith("\\1-grams"):
                break
    return counts


def report(arpa, dev):
    """Print the perplexity of each text."""
    for path in dev:
        perplexity, unknown = arpa.perplexity(read_sentences([path], "--dev"))
        print(f"{path}: perplexity {perplexity:.1f} a word, {unknown} unknown words left out")


if __name__ == "__main__":
    main()
