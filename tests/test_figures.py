"""The figures are drawn from the code: its names and sizes are in them, and nothing else moves."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hyperpyyaml import load_hyperpyyaml

pytest.importorskip("matplotlib")

ROOT = Path(__file__).parents[1]
RECIPE = "hparams/S2S/conmambamamba_small.yaml"


def row(model, *rates):
    """A row of docs/results.json with a seed for each (WER, CER)."""
    runs = [{"seed": i, "test": {"t": rate}} for i, rate in enumerate(rates)]
    return {"figure": {"corpus": "alpha", "model": model}, "runs": runs}


RESULTS = {
    "rows": [
        row("A", {"WER": 10.0, "CER": 4.0}, {"WER": 14.0, "CER": 5.0}),
        row("B", {"WER": 20.0}),
        {"name": "not drawn", "runs": [{"seed": 1, "test": {"t": {"WER": 99.0}}}]},
    ]
}


def draw(folder, results):
    command = [sys.executable, "figures/draw.py", "--output", folder, "--results", results]
    done = subprocess.run(
        list(map(str, command)), cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def texts(path):
    return " | ".join(re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text()))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A folder with both figures."""
    folder = tmp_path_factory.mktemp("figures")
    (folder / "results.json").write_text(json.dumps(RESULTS))
    draw(folder, folder / "results.json")
    return folder


def test_architecture_shows_the_code(drawn, tmp_path):
    with open(ROOT / RECIPE) as f:
        hparams = load_hyperpyyaml(f, {"output_folder": str(tmp_path)})
    encoder, decoder = hparams["encoder"], hparams["decoder"]
    mixer, step = encoder.layers[0].mixer, decoder.layers[0]
    ssm = mixer.forward_ssm
    total = sum(p.numel() for p in hparams["model"].parameters())
    wanted = [
        f"{total / 1e6:.3f} M parameters",
        *(type(m).__name__ for m in (hparams["frontend"], encoder, mixer, decoder, step)),
        *(name for name, _ in mixer.named_children() if name.endswith("_ssm")),
        f"{len(encoder.layers)} × {type(encoder.layers[0]).__name__}",
        f"{len(decoder.layers)} × {type(step).__name__}",
        f"in_proj  {mixer.in_proj.in_features} → 2 × {mixer.in_proj.out_features // 2}",
        f"out_proj  {mixer.out_proj.in_features} → {mixer.out_proj.out_features}",
        f"A {tuple(ssm.A_log.shape)}",
        f"width {ssm.conv1d.kernel_size[0]}",
        f"(B, U, {hparams['output_neurons']})",
        *(f"{name}: {type(getattr(step, name)).__name__}" for name in ("self_mamba", "ffn")),
    ]
    text = texts(drawn / "architecture.svg")
    assert not [word for word in wanted if word not in text]


def test_results_show_means(drawn):
    text = texts(drawn / "results.svg")
    for word in ("alpha", "A", "B", "12.0", "20.0", "4.5", "WER %", "CER %"):
        assert word in text
    assert "99.0" not in text


def test_drawing_again_changes_nothing(drawn, tmp_path):
    printed = draw(tmp_path, tmp_path / "none.json")
    assert "is missing" in printed and not (tmp_path / "results.svg").exists()
    first, second = (f / "architecture.svg" for f in (drawn, tmp_path))
    assert first.read_bytes() == second.read_bytes()
    assert first.stat().st_size < 300_000
