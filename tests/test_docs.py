"""The guides and the code agree: keys, defaults' names, links, commands and variants."""

import importlib.util
import io
import re
import shlex
from functools import cache
from pathlib import Path

import pytest
from hyperpyyaml import load_hyperpyyaml

from modules import launch
from modules.options import RUN_OPTIONS, Wiring, top_level

ROOT = Path(__file__).parents[1]
CONFIGURATION = ROOT / "docs/configuration.md"
PAGES = [p for p in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))) if p.is_file()]
YAML_FILES = sorted(ROOT.glob("hparams/*/*.yaml"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def name(path):
    return str(path.relative_to(ROOT))


# ---- Keys ----


@cache
def keys():
    """{key: whether some file gives it a plain value}."""
    found = {}
    for path in YAML_FILES:
        for key, value in top_level(path).items():
            found[key] = found.get(key, False) or not isinstance(value, Wiring)
    return found


def documented(heading):
    """The names in the first cells of the tables under a heading of the configuration guide."""
    text = CONFIGURATION.read_text()
    section = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)[1]
    cells = re.findall(r"^\|([^|]*)\|", section, re.MULTILINE)
    return {word for cell in cells for word in re.findall(r"`([^`]+)`", cell)}


def test_every_plain_key_is_documented():
    plain = {key for key, is_plain in keys().items() if is_plain}
    assert not plain - documented("Keys")


def test_every_documented_key_exists():
    assert not documented("Keys") - keys().keys()


def test_every_documented_run_option_exists():
    assert not documented("Run options") - RUN_OPTIONS.keys()


# ---- Links ----


def anchors(path):
    """The headings of a page as links name them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_relative_links_resolve(page):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            broken.append(target)
    assert not broken


# ---- Commands ----


def commands(page):
    """Command lines in a page's fenced blocks, as words."""
    for language, block in FENCE.findall(page.read_text()):
        if language not in ("bash", "sh", "console"):
            continue
        for line in block.replace("\\\n", " ").splitlines():
            for part in line.split("&&"):
                words = shlex.split(part.strip().removeprefix("$ "), comments=True)
                while words and re.match(r"[A-Z_]+=", words[0]):
                    words = words[1:]
                if words:
                    yield words


def faults(words):
    """What a command names that is not there."""
    program, *rest = words
    if program == "make":
        targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        return set(rest) - targets
    if program not in ("python", "python3", "torchrun", "pip"):
        return set()
    missing = set()
    if rest[0] == "-m" and importlib.util.find_spec(rest[1]) is None:
        missing.add(rest[1])
    for word in rest:
        ours = word.startswith(("hparams/", "requirements")) or word.endswith(".py")
        if ours and not (ROOT / word).is_file():
            missing.add(word)
    if scripts := [w for w in rest if re.fullmatch(r"train_\w+\.py", w)]:
        missing |= unknown_options(rest[rest.index(scripts[0]) + 1 :])
    return missing


def unknown_options(words):
    """Options of a training script that neither its YAML file nor SpeechBrain has."""
    path = ROOT / words[0]
    known = set(top_level(path)) if path.is_file() else set(keys())
    given = {w[2:].partition("=")[0] for w in words if w.startswith("--")}
    return given - known - RUN_OPTIONS.keys() - {"help"}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_name_what_exists(page):
    wrong = {" ".join(words): found for words in commands(page) if (found := faults(words))}
    assert not wrong


def test_a_wrong_command_is_noticed():
    assert faults(["make", "tea"]) == {"tea"}
    assert faults(["python", "train_RNN.py", "hparams/CTC/conmamba_tiny.yaml"])
    assert faults(["python", "train_CTC.py", "hparams/CTC/conmamba_tiny.yaml", "--d_modle", "8"])
    assert faults(["python", "-m", "modules.nothing"])


# ---- Variants ----


def variants():
    """The changes of files that the guide shows: [(file, old lines, new lines)]."""
    for language, block in FENCE.findall(CONFIGURATION.read_text()):
        if language == "diff":
            header, *lines = block.splitlines()
            old = [line[1:] for line in lines if line.startswith("-")]
            new = [line[1:] for line in lines if line.startswith("+")]
            yield header.removeprefix("--- "), "\n".join(old), "\n".join(new)


@pytest.mark.parametrize(("file", "old", "new"), variants())
def test_variants_build(file, old, new, tmp_path):
    text = (ROOT / file).read_text()
    assert text.count(old) == 1
    small = {"output_folder": str(tmp_path), "num_encoder_layers": 1, "output_neurons": 31}
    hparams = load_hyperpyyaml(io.StringIO(text.replace(old, new)), small)
    layer = hparams["encoder"].layers[0]
    wanted = new.rpartition(".")[2]
    assert wanted in (type(layer.mixer).__name__, type(layer.conv.activation).__name__)
    assert layer.conv.causal == ("causal: True" in new)


def commanded():
    """The variants that need no file: [words after the script's name]."""
    for words in commands(CONFIGURATION):
        if any(word.startswith(("--encoder", "--frontend", "--alphabet")) for word in words):
            yield words[2:]


@pytest.mark.parametrize("words", commanded(), ids=" ".join)
def test_variants_by_the_command_line_build(words, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    small = [f"--output_folder={tmp_path}", "--num_encoder_layers=1", "--device=cpu"]
    _, hparams, *_ = launch.start([*words, *small])
    named = {c for word in words for c in re.findall(r"!name:[\w.]*\.(\w+)", word)}
    assert named <= {type(m).__name__ for m in hparams["encoder"].modules()}


def test_variants_are_shown():
    assert len(list(variants())) >= 3
    assert len(list(commanded())) >= 3
