#!/usr/bin/env python3
"""Transcribe recordings with a packaged model: python transcribe.py FILE... --model DIR"""

import os
import shutil
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from tqdm import tqdm

from inference.formats import FORMATS
from inference.jobs import ESCAPED, STDIN, find, jobs_of, write
from inference.listener import check_batch_size
from inference.windows import limits
from modules.command import argument_parser, number, plain_errors
from modules.errors import UserError

EXAMPLES = """
examples:
  python transcribe.py speech.flac --model packages/conmamba
  python transcribe.py talks/ --model DIR --format srt --output-dir subtitles
  python transcribe.py "calls/*.mp3" --model DIR --format json --word-timestamps > calls.jsonl
  python transcribe.py lecture.m4a --model DIR --format vtt --output-dir . --device cuda
  curl -s https://example.org/a.ogg | python transcribe.py - --model DIR
  python transcribe.py speech.wav --model DIR --beam 50 --lm 4-gram.arpa
  python transcribe.py speech.wav --model packages/s2s --lm results/LM/mamba/3402

DIR is a package: python package.py OUTPUT_FOLDER --output DIR makes one from a training. It may be
user/model on the Hugging Face hub, which is downloaded once and read as strictly. A file
model.onnx that export.py made from a package does too, on the CPU and without PyTorch installed.

wav, flac, mp3, ogg and opus of any sample rate and any channels; m4a, mp4, webm and what else
FFmpeg reads after `pip install av`. A folder is searched through, and its layout kept below
--output-dir. Recordings of hours are heard in windows, --batch-size at a time, in bounded memory.

On stdout a recording's text is a line, after its path and a tab when there are several; json is
a line a recording, with its path as "file". srt, vtt and tsv of several need --output-dir.

exit status: 0 all done; 1 some recordings could not be used, the others are done; 2 nothing was
begun, for a mistake in the command line or in the package.
"""


def parser():
    p = argument_parser("Turn recordings into text, with times and confidences of words.", EXAMPLES)
    p.add_argument("inputs", nargs="+", metavar="FILE", help='file, folder, "glob" or - for stdin')
    add_model_options(p)
    p.add_argument("--format", choices=FORMATS, default="txt", help="what to write (txt)")
    p.add_argument("--output-dir", metavar="DIR", help="a file a recording here, not stdout")
    p.add_argument(
        "--word-timestamps",
        action="store_true",
        help="json: words with times and confidences too; srt, vtt, tsv: a cue or row a word",
    )
    p.add_argument("--overwrite", action="store_true", help="replace files in --output-dir")
    return p


def add_model_options(p):
    """What says which model hears, where, and how."""
    p.add_argument(
        "--model",
        required=True,
        metavar="DIR",
        help="the package, a name on the hub, or a file .onnx",
    )
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (auto)")
    p.add_argument(
        "--batch-size", type=int, default=16, metavar="N", help="recordings heard at once (16)"
    )
    p.add_argument("--beam", type=int, metavar="N", help="hypotheses kept (the package's number)")
    p.add_argument(
        "--lm",
        metavar="PATH",
        help="word n-gram, .arpa or .bin, for a CTC model; for one with a decoder the output "
        "folder of train_LM.py (the package's, if it has one)",
    )
    p.add_argument(
        "--lm-weight", type=number, metavar="W", help="its weight (the package's, or 0.5)"
    )
    p.add_argument(
        "--word-bonus", type=number, metavar="B", help="n-gram: added a word (the package's, or 0)"
    )
    p.add_argument(
        "--chunk-seconds",
        type=number,
        metavar="S",
        help="longer recordings are heard in windows of S, cut at silences; 0: all in one piece, "
        "in bounded memory with a causal or chunked CTC model "
        "(left out: in one piece up to the longest utterance that training and test stage met, "
        "longer ones in windows as long as the training's utterances)",
    )


def main():
    arguments = parser().parse_args()
    if hasattr(sys.stdout, "reconfigure"):  # a name that it cannot show stops no batch
        sys.stdout.reconfigure(errors=ESCAPED)
    with (
        plain_errors("interrupted; what is written is whole", "what is written is whole"),
        tempfile.TemporaryDirectory(prefix="transcribe-") as scratch,
    ):
        failed = run(arguments, Path(scratch) / "stdin")
    sys.exit(1 if failed else 0)


def run(arguments, stdin):
    """Transcribe; returns the number of recordings that could not be used."""
    check_batch_size(arguments.batch_size)
    limits(arguments.chunk_seconds)
    if arguments.word_timestamps and arguments.format == "txt":
        raise UserError("--word-timestamps: txt has no times; give --format json, srt, vtt or tsv")
    if STDIN in arguments.inputs and sys.stdin is None:
        raise UserError("-: stdin is closed; pipe a recording into it, or give a file's path")
    found = find(arguments.inputs, stdin)
    jobs = jobs_of(found, arguments.output_dir, arguments.format, arguments.overwrite)
    if len(jobs) > 1 and not arguments.output_dir and arguments.format not in ("txt", "json"):
        raise UserError(
            f"--format {arguments.format}: {len(jobs)} recordings do not fit into one stdout; give "
            "--output-dir, or --format json"
        )
    make_folder(arguments.output_dir)
    recognizer = load(arguments)
    if any(job.name == STDIN for job in jobs):
        with open(stdin, "wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
    return transcribe(recognizer, jobs, arguments)


def load(arguments):
    """The recogniser of --model; PyTorch is imported for a package alone."""
    if Path(arguments.model).suffix == ".onnx":
        from inference.onnx import OnnxRecognizer

        if arguments.device not in ("auto", "cpu"):
            raise UserError(
                f"--device {arguments.device}: a file .onnx runs on the CPU; leave it out"
            )
        for option in ("lm", "lm_weight", "word_bonus"):
            if (value := getattr(arguments, option)) is not None:
                named = f"--{option.replace('_', '-')} {value}"
                raise UserError(f"{named}: give the package as --model, not a file .onnx")
        return OnnxRecognizer.from_file(arguments.model, arguments.beam)
    if find_spec("torch") is None:
        raise UserError(
            f"--model {arguments.model}: a package needs PyTorch, which is not installed; `pip "
            "install -r requirements.txt`, or give a file .onnx of it (export.py)"
        )
    from inference import Recognizer

    return Recognizer.from_folder(
        arguments.model,
        arguments.device,
        beam_size=arguments.beam,
        lm=arguments.lm,
        lm_weight=arguments.lm_weight,
        word_bonus=arguments.word_bonus,
    )


def make_folder(folder):
    """UserError when the output folder cannot be one."""
    if folder is None:
        return
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output-dir {folder}: {error.strerror}; give another folder") from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"--output-dir {folder} cannot be written to; give another folder")


def transcribe(recognizer, jobs, arguments):
    """Hear the jobs and write what was heard as it comes; returns the number that failed."""
    failed = 0
    waiting = {str(job.path): job for job in jobs}
    bar = tqdm(total=len(jobs), unit="file", disable=None, file=sys.stderr, dynamic_ncols=True)

    def progress(path, seconds, total):
        whole = f" of {total / 60:.1f}" if total else ""
        bar.set_postfix_str(f"{Path(path).name}: {seconds / 60:.1f}{whole} min")

    results = recognizer.transcribe_files(
        list(waiting),
        arguments.batch_size,
        arguments.chunk_seconds,
        in_order=arguments.output_dir is None,
        progress=progress,
    )
    with bar:
        for result in results:
            job = waiting.pop(result.path)
            error = result.error or put(job, result.transcript, arguments, len(jobs) > 1)
            if error:
                failed += 1
                tqdm.write(f"error: {error.replace(str(job.path), job.name)}", file=sys.stderr)
            bar.set_postfix_str("")
            bar.update()
    if failed:
        print(f"{failed} of {len(jobs)} could not be transcribed", file=sys.stderr)
    return failed


def put(job, transcript, arguments, several):
    """Write one transcript to its file or to stdout; returns what went wrong, or None."""
    text = FORMATS[arguments.format](transcript, arguments.word_timestamps, job.name)
    if job.output is None:
        name = f"{job.name}\t" if several and arguments.format == "txt" else ""
        tqdm.write(name + text, file=sys.stdout, end="")
        sys.stdout.flush()
        return None
    try:
        write(text, job.output)
    except OSError as error:
        return f"{job.name}: {job.output} cannot be written: {error.strerror}"
    return None


if __name__ == "__main__":
    main()
