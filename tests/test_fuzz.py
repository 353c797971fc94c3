"""What strangers send, made up and damaged: an error that says why, no crash, no hang, no memory.

More of it, other each time: python -m tests.recipes.fuzzed_audio 20000 random, and
python -m tests.recipes.fuzzed_uploads 5000 random
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
from hyperpyyaml import resolve_references
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from speechbrain.dataio.dataset import DynamicItemDataset

from inference.resolved import Resolved, configuration
from librispeech_prepare import prepare_librispeech
from modules.errors import UserError
from tests.recipes import runs

# The same examples in every run; a database would leave files in the repository.
COMMON = {
    "deadline": 5000,
    "derandomize": True,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}


def test_recordings():
    """In a process of its own: decoders are C, and memory is limited to 512 MB more."""
    command = [sys.executable, "-m", "tests.recipes.fuzzed_audio", "400"]
    done = runs.run(command, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


# ---- Uploads ----


def upload(examples):
    """To a process of its own: 400 is the parser's answer, 415 and 422 the decoder's."""
    pytest.importorskip("fastapi")
    from tests.recipes import fuzzed_uploads

    counts = fuzzed_uploads.fuzz(fuzzed_uploads.shared(), examples)
    assert {200, 400, 415} <= counts.keys()


@pytest.mark.filterwarnings("ignore:Generating overly large repr")
def test_uploads():
    upload(60)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Generating overly large repr")
def test_many_uploads():
    upload(3000)


# ---- Corpora ----


@pytest.fixture(scope="module")
def folder():
    """A split of one utterance; its transcript is what is made up."""
    with tempfile.TemporaryDirectory() as name:
        split = Path(name) / "data/split"
        split.mkdir(parents=True)
        sf.write(split / "a.wav", 0.1 * np.sin(np.arange(8000) / 10), 16000)
        yield Path(name)


def prepare(folder, name):
    """Prepare; what is written SpeechBrain must read, one line an utterance."""
    try:
        prepare_librispeech(
            folder / "data", folder / "save", [name], max_bad_fraction=1.0, workers=1
        )
    except UserError as error:
        assert str(error)
        return
    dataset = DynamicItemDataset.from_csv(folder / f"save/{name}.csv")
    text = (folder / f"save/{name}.csv").read_text(encoding="utf-8")
    assert len(dataset) == len(text.splitlines()) - 1 > 0


characters = st.sampled_from("aAZ '\",;\t\r\v\x1c\x85\u2028\u3000\0\x1b$é\ufeff{}[]:-./\\")
text = st.text(characters, max_size=12) | st.text(max_size=8)
lines = st.lists(text.map(str.encode) | st.binary(max_size=12), max_size=6).map(b"\n".join)


@settings(max_examples=100, **COMMON)
@given(lines, text)
@example(b"\xe2\x80\x83", "")
@example(b"a " + b"x" * (1 << 20), "")
def test_transcripts(folder, more, words):
    known = f"a {words}\n".encode("utf-8", "surrogatepass")
    (folder / "data/split/x.trans.txt").write_bytes(known + more)
    prepare(folder, "split")


scalars = st.none() | st.booleans() | st.integers() | st.floats() | text
values = st.recursive(
    scalars, lambda x: st.lists(x, max_size=3) | st.dictionaries(text, x, max_size=3)
)
audio = st.sampled_from(
    ["split/a.wav", "split", ".", "/dev/zero", "/dev/stdin", "a\0b", "x" * 5000]
)
names = st.sampled_from(["ID", "wav", "wrd", "text", "duration", "offset", "spk_id"]) | text
rows = st.builds(
    lambda wav, row: json.dumps({"wav": wav, "text": "HELLO"} | row),
    audio,
    st.dictionaries(names, values, max_size=4),
)


@settings(max_examples=100, **COMMON)
@given(st.lists(rows.map(str.encode) | lines, max_size=4).map(b"\n".join))
@example(b'{"wav": "\\ud800", "text": "A"}')
@example(b"[" * 100_000)
@example(b'{"wav": ' * 20_000)
@example(b'{"wav": "split/a.wav", "text": "A", "duration": 1' + b"0" * 4000 + b"}")
@example(b'{"wav": "split/a.wav", "text": "A", "duration": 1' + b"0" * 5000 + b"}")
def test_manifests_of_json(folder, content):
    (folder / "data/json.jsonl").write_bytes(content)
    prepare(folder, "json")


def table(header, rows):
    return b"\n".join([header.encode(), *(b",".join(row) for row in rows)])


fields = audio.map(str.encode) | text.map(lambda s: s.encode("utf-8", "surrogatepass")) | lines


@settings(max_examples=100, **COMMON)
@given(
    st.builds(
        table,
        st.sampled_from(["ID,wav,wrd", "ID,wav,wrd,duration,spk_id"]) | text,
        st.lists(st.lists(fields, min_size=3, max_size=5), max_size=4),
    )
)
@example(b"ID,wav,wrd\n" + b'"' + b"x" * 200_000)
def test_manifests_of_csv(folder, content):
    (folder / "data/csv.csv").write_bytes(content)
    prepare(folder, "csv")


# ---- Configurations ----


@pytest.fixture(scope="module")
def resolved(folder):
    with open(runs.ROOT / "hparams/S2S/conmambamamba_tiny.yaml") as file:
        return resolve_references(file).read().splitlines()


@settings(max_examples=150, **COMMON)
@given(st.data())
def test_yaml_of_a_run_to_be_packaged(folder, resolved, data):
    lines = list(resolved)
    tags = [
        "!new:os.system",
        "!apply:os.abort",
        "!name:os.abort",
        "!module:os",
        "!include:x",
        "*id001",
    ]
    yaml_text = (
        st.sampled_from([*tags, "!!python/name:os.abort", "{a: b}", "[1, [2]]", "null", ""]) | text
    )
    for _ in range(data.draw(st.integers(1, 4))):
        i = data.draw(st.integers(0, len(lines) - 1))
        name, colon, value = lines[i].partition(": ")
        what = data.draw(st.sampled_from(["value", "name", "line", "remove", "twice"]))
        if what == "value":
            lines[i] = name + colon + data.draw(yaml_text)
        elif what == "name":
            lines[i] = data.draw(yaml_text) + colon + value
        elif what == "line":
            lines[i] = data.draw(yaml_text)
        else:
            lines[i : i + 1] = [] if what == "remove" else [lines[i]] * 2
    path = folder / "hyperparams.yaml"
    path.write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass")
    try:
        json.dumps(configuration(Resolved(path)))
    except UserError as error:
        assert str(error)
