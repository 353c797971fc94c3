#!/usr/bin/env python3
"""Hear a stream with a packaged model: python stream.py --microphone --model DIR"""

import json
import shutil
import sys
import time
from array import array
from dataclasses import dataclass, field

import torch

from inference import StreamingRecognizer, sources
from inference.formats import rounded
from inference.transcript import Final
from modules.command import argument_parser, number, plain_errors, threads
from modules.errors import UserError

EXAMPLES = """
examples:
  python stream.py --microphone --model DIR
  python stream.py speech.flac --model DIR             as fast as it sounds
  python stream.py speech.flac --model DIR --fast      as fast as it goes
  arecord -q -f S16_LE -r 16000 -c 1 -t raw | python stream.py - --model DIR
  ffmpeg -loglevel error -i talk.mp4 -f s16le -ac 1 -ar 16000 - | python stream.py - --model DIR
  python stream.py speech.flac --model DIR --fast --format json > speech.jsonl

DIR is a package (package.py) of a causal or a chunked model, hparams/CTC/conmamba_causal_small.yaml
or hparams/CTC/conmamba_chunked_small.yaml.

A line on stdout is a segment that is final: it ended in a pause. On a terminal the last line is
what may still change. json is a line a result: "type" partial or final, "text", "start" and "end"
in seconds, "words" with times and confidences. stderr has the latency at the end.

Ctrl-C ends the stream: what was heard is made final, and the latency told.

exit status: 0 done; 1 the stream broke off, what came before is written, or held no sample;
2 nothing was begun; 130 a file or stdin was interrupted.
"""


def parser():
    p = argument_parser("Turn speech into text while it is spoken.", EXAMPLES)
    p.add_argument("input", nargs="?", metavar="FILE", help="a file, or - for raw PCM on stdin")
    p.add_argument("--microphone", action="store_true", help="hear the microphone")
    p.add_argument(
        "--model", required=True, metavar="DIR", help="the package, or a name on the hub"
    )
    p.add_argument("--fast", action="store_true", help="a file: do not wait for its sound")
    p.add_argument(
        "--rate", type=int, metavar="HZ", help="of the PCM or the microphone (the model's)"
    )
    p.add_argument("--input", dest="microphone_name", metavar="NAME", help="which microphone")
    p.add_argument("--format", choices=WRITERS, default="txt", help="what to write (txt)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (auto)")
    p.add_argument("--threads", type=threads, default=1, metavar="N", help="of a CPU (1)")
    p.add_argument(
        "--chunk-seconds",
        type=number,
        metavar="S",
        help="computed at once (a chunked model's own chunk, 0.32 of a causal one)",
    )
    p.add_argument(
        "--endpoint-seconds",
        type=number,
        default=0.8,
        metavar="S",
        help="pause that ends a segment (0.8); 0: none does",
    )
    return p


class TextWriter:
    """Finals on lines of their own; on a terminal the partial text after them."""

    def __init__(self, out):
        self.out, self.live = out, out.isatty()
        self.clear = "\r\x1b[K" if self.live else ""

    def partial(self, partial):
        if self.live:
            width = shutil.get_terminal_size().columns - 1
            self.out.write(self.clear + partial.text[-width:])
            self.out.flush()

    def final(self, final):
        self.out.write(f"{self.clear}{final.text}\n")
        self.out.flush()


class JsonWriter:
    """One object a line."""

    def __init__(self, out):
        self.out = out

    def partial(self, partial):
        if partial.words:
            self.write("partial", Final(partial.text, *span(partial.words), partial.words))

    def final(self, final):
        self.write("final", final)

    def write(self, kind, final):
        fields = {"type": kind, **rounded(final), "words": [rounded(w) for w in final.words]}
        self.out.write(json.dumps(fields, ensure_ascii=False) + "\n")
        self.out.flush()


WRITERS = {"txt": TextWriter, "json": JsonWriter}


def span(words):
    return words[0].start, words[-1].end


@dataclass
class Latency:
    """Seconds of compute: of each chunk, and in all."""

    chunks: array = field(default_factory=lambda: array("d"))
    total: float = 0.0

    def report(self, stream, seconds):
        """Lines for a user."""
        lines = [f"{seconds:.1f} s of audio, {self.total:.2f} s of compute"]
        if seconds:
            lines[0] += f": real-time factor {self.total / seconds:.3f}"
        if self.chunks:
            points = torch.tensor([0.5, 0.95, 0.99, 1.0])
            p50, p95, p99, most = (torch.tensor(self.chunks).quantile(points) * 1000).tolist()
            lines.append(
                f"{len(self.chunks)} chunks of {stream.chunk_seconds * 1000:.0f} ms, compute p50 "
                f"{p50:.1f} ms, p95 {p95:.1f} ms, p99 {p99:.1f} ms, longest {most:.1f} ms; looks "
                f"{stream.lookahead_seconds * 1000:.0f} ms ahead, so that a sound waits for up to "
                f"{stream.delay_seconds * 1000:.0f} ms of audio"
            )
        return "\n".join(lines)


def main():
    options = parser().parse_args()
    if hasattr(sys.stdout, "reconfigure"):  # a letter that it cannot show ends no stream
        sys.stdout.reconfigure(errors="backslashreplace")
    with plain_errors():
        status = run(options)
    sys.exit(status)


def run(options):
    """Hear the stream to its end; returns the exit status."""
    check(options)
    torch.set_num_threads(options.threads)
    stream = StreamingRecognizer.from_folder(
        options.model,
        options.device,
        options.chunk_seconds,
        options.endpoint_seconds or None,
        history=False,
    )
    source = open_source(options, stream.sample_rate)
    writer, latency, status = WRITERS[options.format](sys.stdout), Latency(), 0
    duration = 0.0
    try:
        for block in source.at(stream.sample_rate):
            for packet in block.split(stream.chunk):  # at most one chunk each
                duration += len(packet) / stream.sample_rate
                hear(stream, packet, writer, latency)
        if not duration:
            name = "stdin" if options.input == "-" else options.input
            raise UserError(f"{name} holds no samples; give audio that is not empty")
    except KeyboardInterrupt:
        status = 0 if options.microphone else 130
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 1
    started = time.perf_counter()
    words = stream.finish().words
    latency.total += time.perf_counter() - started
    if words:
        writer.final(Final(" ".join(w.text for w in words), *span(words), words))
    print(latency.report(stream, duration), file=sys.stderr)
    return status


def check(options):
    """UserError for options that do not go together."""
    if options.microphone == (options.input is not None):
        raise UserError("give one of FILE, - and --microphone")
    is_file = not options.microphone and options.input != "-"
    if options.fast and not is_file:
        raise UserError("--fast: only a file can come faster than it sounds")
    if options.rate is not None and is_file:
        raise UserError("--rate: a file tells its own rate; leave it out")
    if options.microphone_name is not None and not options.microphone:
        raise UserError("--input chooses a microphone; give --microphone too")
    if options.input == "-" and sys.stdin is None:
        raise UserError("-: stdin is closed; pipe raw PCM into it, or give a file's path")
    if options.rate is not None:
        sources.check_rate(options.rate)


def open_source(options, rate):
    if options.microphone:
        return sources.microphone(options.rate or rate, options.microphone_name, warn)
    if options.input == "-":
        return sources.pcm(sys.stdin.buffer, options.rate or rate)
    return sources.file(options.input, options.fast)


def hear(stream, packet, writer, latency):
    """Push one packet and write what is new."""
    before, shown, started = stream.chunks, stream.partial, time.perf_counter()
    partial = stream.push(packet)
    seconds = time.perf_counter() - started
    latency.total += seconds
    if stream.chunks > before:
        latency.chunks.append(seconds)
    for final in partial.finals:
        writer.final(final)
    if partial.text != shown.text:
        writer.partial(partial)


def warn(text):
    print(f"warning: {text}", file=sys.stderr)


if __name__ == "__main__":
    main()
