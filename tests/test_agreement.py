"""Every way from a recording to text gives the same: tests/recipes/agreement.py on tiny models."""

import json
import sys

import pytest

from tests.recipes import agreement, runs
from tests.recipes.packages import LEARNS, make_package

WAYS = {"test stage", "Recognizer", "transcribe.py", "serve.py", "serve.py, stream=true"}
STREAMS = WAYS | {"one pass", "StreamingRecognizer", "WS /v1/stream", "ONNX", "ONNX, in steps"}


def compared(model):
    command = [sys.executable, "-m", "tests.recipes.agreement", model, "--data", runs.corpus()]
    return runs.run([*map(str, command)], timeout=600)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("yaml_file", "options", "ways"),
    [
        ("CTC/conmamba_tiny.yaml", {}, WAYS | {"ONNX"}),
        ("CTC/conmamba_causal_tiny.yaml", {}, STREAMS),
        ("CTC/conmamba_chunked_tiny.yaml", {"chunk_size": 8, "lookahead": 2}, STREAMS),
    ],
    ids=["whole", "causal", "chunked"],
)
def test_all_ways_agree(yaml_file, options, ways):
    run, _ = make_package(yaml_file, LEARNS | {"number_of_epochs": 4} | options)
    done = compared(run)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert set(report["differ"]) == ways
    assert (report["recordings"], report["words"] > 8) == (8, True)
    for path in run.glob("wer_*.txt"):  # a text that is another is noticed
        path.write_text(path.read_text().replace("BEAD", "BEE").replace("CAB", "CUP"))
    done = compared(run)
    assert done.returncode == 1
    report = json.loads(done.stdout.splitlines()[-1])
    assert min(n for way, n in report["differ"].items() if way in WAYS - {"test stage"}) > 0


def test_differences_are_counted_and_shown(capsys):
    ways = {"a": {"1": "ONE", "2": "TWO"}, "b": {"1": "ONE", "2": "TO"}, "c": {"1": "ONE"}}
    assert agreement.differences(ways) == {"a": 0, "b": 1, "c": 1}
    shown = capsys.readouterr().out
    assert "1 of 2" in shown and "2: a 'TWO', b 'TO'" in shown and "c None" in shown
