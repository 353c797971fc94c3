#!/usr/bin/env python3
"""Serve a packaged model over HTTP: python serve.py --model DIR"""

import os
import sys
from pathlib import Path

from inference.server import check_installed
from inference.server.limits import MB, Limits
from modules.command import argument_parser, number, plain_errors, threads
from modules.errors import UserError

EXAMPLES = """
examples:
  python serve.py --model packages/conmamba
  python serve.py --model DIR --host 0.0.0.0 --port 80 --device cuda --batch-size 32
  MAMBA_ASR_API_KEY=secret python serve.py --model DIR

  curl -F file=@speech.flac http://127.0.0.1:8000/v1/audio/transcriptions
  curl -F file=@talk.mp3 -F response_format=srt http://127.0.0.1:8000/v1/audio/transcriptions

DIR is a package: python package.py OUTPUT_FOLDER --output DIR makes one from a training.

/                          a page to drop a file on, or to speak
/v1/audio/transcriptions   as the OpenAI API's: response_format json, text, verbose_json, srt, vtt
/v1/stream                 WebSocket for live audio, with a causal or chunked model
/health, /ready, /metrics  alive; warm; numbers for Prometheus

Requests that come together are computed together. SIGTERM and Ctrl-C let what runs end.
docs/deployment.md tells the rest.

exit status: 0 ended by a signal, all done; 2 nothing was begun.
"""


def parser():
    p = argument_parser("Serve a packaged model over HTTP.", EXAMPLES)
    d = Limits()
    p.add_argument(
        "--model", required=True, metavar="DIR", help="the package, or a name on the hub"
    )
    p.add_argument("--host", default="127.0.0.1", help="0.0.0.0: for other machines (127.0.0.1)")
    p.add_argument("--port", type=int, default=8000, help="0: the system chooses (8000)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (auto)")
    p.add_argument("--threads", type=threads, metavar="N", help="of a CPU, a batch (all cores)")
    p.add_argument("--beam", type=int, metavar="N", help="hypotheses kept (the package's number)")
    p.add_argument("--lm", metavar="FILE", help="as of transcribe.py: an n-gram, or a folder")
    p.add_argument(
        "--lm-weight", type=number, metavar="W", help="its weight (the package's, or 0.5)"
    )
    p.add_argument(
        "--word-bonus", type=number, metavar="B", help="n-gram: added a word (the package's, or 0)"
    )

    def limit(option, kind, default, what):
        metavar = "N" if kind is int else "X"
        p.add_argument(
            option, type=kind, default=default, metavar=metavar, help=f"{what} ({default:g})"
        )

    limit("--batch-size", int, d.batch, "windows of recordings that are computed together")
    limit("--max-upload-mb", number, d.upload / MB, "size of a recording as it is sent")
    limit("--max-audio-minutes", number, d.audio / 60, "length of a recording as it is decoded")
    limit("--max-queue", int, d.queue, "requests at a time; more are told to come again")
    limit("--max-streams", int, d.streams, "live streams at a time")
    limit("--timeout-seconds", number, d.seconds, "from a request's start to its answer")
    limit("--idle-seconds", number, d.idle, "a live stream without audio is closed then")
    limit("--drain-seconds", int, 30, "what runs when the server is stopped may take so long")
    p.add_argument(
        "--api-key-file",
        metavar="FILE",
        help="holds the key that requests under /v1 must bring; or set MAMBA_ASR_API_KEY",
    )
    p.add_argument(
        "--log-transcripts", action="store_true", help="write what was said to the log too"
    )
    return p


def main():
    options = parser().parse_args()
    with plain_errors("interrupted before it served"):
        check_installed()
        serve(options)


def serve(options):
    limits = Limits(
        upload=int(options.max_upload_mb * MB),
        audio=options.max_audio_minutes * 60,
        queue=options.max_queue,
        seconds=options.timeout_seconds,
        streams=options.max_streams,
        idle=options.idle_seconds,
        batch=options.batch_size,
    )
    key = api_key(options.api_key_file)

    from inference.server import process  # after check_installed

    listening = process.listen(options.host, options.port)
    service = service_of(options, limits, key)
    process.start_logging()
    host = f"[{options.host}]" if ":" in options.host else options.host
    print(f"serving {service.name} on http://{host}:{listening.getsockname()[1]}", file=sys.stderr)
    process.run(service, listening, options.drain_seconds)


def service_of(options, limits, key):
    """The model, loaded."""
    import torch

    from inference import Recognizer
    from inference.server.service import Service

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    recognizer = Recognizer.from_folder(
        options.model,
        options.device,
        options.beam,
        options.lm,
        options.lm_weight,
        options.word_bonus,
    )
    name = Path(options.model).resolve().name
    return Service(recognizer, name, limits, key, options.log_transcripts)


def api_key(path):
    """The key of the file or of the environment, or None."""
    if path is None:
        source, key = "MAMBA_ASR_API_KEY", os.environ.get("MAMBA_ASR_API_KEY", "").strip()
        if not key:
            return None
    else:
        source = f"--api-key-file {path}"
        try:
            key = Path(path).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{source}: {getattr(error, 'strerror', error)}") from None
        if not key:
            raise UserError(f"{source} is empty; write a key into it")
    if not key.isascii():
        raise UserError(f"{source} holds letters that are not ASCII, which headers cannot carry")
    return key


if __name__ == "__main__":
    main()
