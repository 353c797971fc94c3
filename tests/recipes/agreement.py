"""One model and every way from a recording to text: do they agree, utterance by utterance?

    python -m tests.recipes.agreement results/CTC/conmamba_small/3402 --data digits/test-clean
    python -m tests.recipes.agreement packages/conmamba --data talks --limit 20

Given an output folder, it is packaged in a scratch folder, and the texts of its test stage
(wer_*.txt) are compared too. Two searches, each with one right text:

beam    the test stage, Recognizer, transcribe.py, serve.py asked by OpenAI's client, and the model
        exported to ONNX in float32, whole and, if it streams, in steps
greedy  one pass over the whole recording, StreamingRecognizer in packets of any size and
        WS /v1/stream, for a causal or chunked model

transcribe.py and serve.py are real processes. The last line is JSON. Exit status: 0 they agree;
1 some text differs; 2 nothing could be compared.
"""

import argparse
import json
import random
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import openai
import torch
from websockets.sync.client import connect

from inference import Recognizer, StreamingRecognizer
from inference.export import export
from inference.jobs import recordings_below
from inference.package import package
from inference.streaming_ctc import check_streams
from modules.errors import UserError
from modules.search import ctc_greedy
from tests.recipes import runs
from tests.recipes.packages import hypotheses

CLIENTS = 4
PACKETS = (1, 160, 5120, 100_000)  # samples; those of a stream are drawn up to one of these


def compare(model, folder, limit=None):
    """All texts -> {family: {way: {recording: text}}}, {way: why it is left out}."""
    from tests.server.servers import Process  # FastAPI and uvicorn

    with tempfile.TemporaryDirectory(prefix="agreement-") as scratch:
        scratch, tests = Path(scratch), None
        if not (model / "config.json").is_file():
            tests = hypotheses(model)
            model = package(model, scratch / "package")
        paths = {p.stem: p.resolve() for p in recordings_below(folder)}
        if tests is not None:
            paths = {name: p for name, p in paths.items() if name in tests}
            if not paths:
                raise UserError(
                    f"no recording of {folder} is in the run's wer_*.txt; give the folder of its "
                    "test set, or its package instead of the run"
                )
        paths = dict(sorted(paths.items())[:limit])
        here = scratch / "audio"
        here.mkdir()
        for path in paths.values():
            (here / path.name).symlink_to(path)
        recognizer, left_out = Recognizer.from_folder(model, "cpu"), {}
        beam = {} if tests is None else {"test stage": {name: tests[name] for name in paths}}
        found = recognizer.transcribe(list(paths.values()))
        beam["Recognizer"] = {n: t.text for n, t in zip(paths, found, strict=True)}
        beam["transcribe.py"] = by_command(here, model)
        server = Process(model)
        beam["serve.py"] = by_client(server.url, paths, whole)
        beam["serve.py, stream=true"] = by_client(server.url, paths, in_events)
        for way, streaming in exported(recognizer, left_out):
            file = scratch / f"{way}.onnx"
            export(model, "onnx", file, streaming=streaming)
            beam[way] = by_command(here, file)
        greedy = {}
        if (why := why_not(check_streams, recognizer)) is None:
            stream = StreamingRecognizer(recognizer, endpoint_seconds=None)
            samples = {n: read(recognizer, p) for n, p in paths.items()}
            greedy["one pass"] = {n: one_pass(recognizer, x) for n, x in samples.items()}
            greedy["StreamingRecognizer"] = {n: streamed(stream, x) for n, x in samples.items()}
            ask = {n: (server.url, x, recognizer.sample_rate) for n, x in samples.items()}
            greedy["WS /v1/stream"] = {n: by_socket(*a) for n, a in ask.items()}
        else:
            left_out["streams"] = why
        server.stop()
    return {"beam": beam, "greedy": greedy}, left_out


def exported(recognizer, left_out):
    """Yield (way, whether in steps) of what a model is exported to; why not goes to left_out."""
    if "decoder" in recognizer.model:
        left_out["ONNX"] = "the other texts are the decoder's, which is not exported"
        return
    yield "ONNX", False
    if (why := why_not(check_streams, recognizer)) is None:
        yield "ONNX, in steps", True
    else:
        left_out["ONNX, in steps"] = why


def why_not(check, *arguments):
    """A check's reason, or None."""
    try:
        check(*arguments)
    except UserError as error:
        return str(error)
    return None


def read(recognizer, path):
    """A recording's samples (N,) at the model's rate."""
    return torch.cat(list(recognizer.read(recognizer.open(path))))


def by_command(folder, model):
    """transcribe.py's texts of a folder: {recording: text}."""
    command = [sys.executable, "transcribe.py", folder, "--model", model, "--format", "json"]
    done = runs.run([*map(str, command)], timeout=3600)
    if done.returncode:
        raise UserError(f"transcribe.py --model {model} ended with {done.stderr[-500:]}")
    lines = map(json.loads, done.stdout.splitlines())
    return {Path(line["file"]).stem: line["text"] for line in lines}


def by_client(url, paths, ask):
    """A server's texts by OpenAI's client, several at a time."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=3600)
    create = client.audio.transcriptions.create
    with ThreadPoolExecutor(CLIENTS) as pool:
        texts = pool.map(lambda path: ask(create, path), paths.values())
        return dict(zip(paths, texts, strict=True))


def whole(create, path):
    return create(model="any", file=path).text


def in_events(create, path):
    *deltas, done = create(model="any", file=path, stream=True)
    added = "".join(event.delta for event in deltas)
    return done.text if added == done.text else f"{added!r}, then {done.text!r}"


@torch.no_grad()
def one_pass(recognizer, x):
    """Greedy text of samples (N,) in one pass, in the model's own chunks."""
    y, lengths = recognizer.encode(x[None].to(recognizer.device), torch.tensor([len(x)]))
    (tokens,) = ctc_greedy(recognizer.model["ctc_head"](y).log_softmax(-1), lengths)
    return " ".join(recognizer.tokenizer.decode(tokens).split())


def streamed(stream, x):
    """The text of samples (N,) in packets of sizes that are drawn."""
    draw, start = random.Random(len(x)), 0
    while start < len(x):
        size = draw.randint(1, draw.choice(PACKETS))
        stream.push(x[start : start + size])
        start += size
    return stream.finish().text


def by_socket(url, x, rate):
    """The text of a live stream that no pause ends."""
    data = x.numpy().astype(np.float32).tobytes()
    with connect(f"{url.replace('http', 'ws')}/v1/stream", proxy=None) as socket:
        start = {"type": "start", "sample_rate": rate, "format": "f32le", "endpoint_seconds": 0}
        socket.send(json.dumps(start))
        for i in range(0, len(data), 4 * rate):
            socket.send(data[i : i + 4 * rate])
        socket.send(json.dumps({"type": "finish"}))
        found = [json.loads(message) for message in socket]
    if found[-1]["type"] != "done":
        raise UserError(f"WS /v1/stream ended with {found[-1]}")
    return " ".join(m["text"] for m in found if m["type"] == "final")


def differences(ways):
    """{way: texts} -> {way: number of texts that are not the first way's}, printed one by one."""
    counts, first = {}, next(iter(ways), None)
    for way, texts in ways.items():
        wrong = [n for n in ways[first] if texts.get(n) != ways[first][n]]
        counts[way] = len(wrong)
        print(f"  {way:<22} {len(ways[first]) - len(wrong)} of {len(ways[first])}")
        for name in wrong:
            print(f"    {name}: {first} {ways[first][name]!r}, {way} {texts.get(name)!r}")
    return counts


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a training's output folder, or a package")
    parser.add_argument("--data", type=Path, required=True, help="a folder of recordings")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N of them")
    options = parser.parse_args()
    try:
        families, left_out = compare(options.model, options.data, options.limit)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    report = {"model": str(options.model), "left out": left_out, "differ": {}}
    for family, ways in families.items():
        if ways:
            print(f"{family}: texts that are those of the {next(iter(ways))}")
            report["differ"] |= differences(ways)
    both = [next(iter(ways.values())) for ways in families.values() if ways]
    report["recordings"] = len(both[0])
    report["words"] = sum(len(text.split()) for text in both[0].values())
    if len(both) == 2:  # two searches: no fault, but good to know
        report["beam and greedy differ"] = sum(both[0][n] != both[1][n] for n in both[0])
        print(f"the two searches differ in {report['beam and greedy differ']} texts")
    for way, why in left_out.items():
        print(f"left out: {way}: {why}")
    print(json.dumps(report))
    sys.exit(any(report["differ"].values()))


if __name__ == "__main__":
    main()
