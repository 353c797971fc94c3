"""Packages that tests load: trained once a test run, on the tones of `runs.speak`."""

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

import numpy as np

from inference.package import package
from tests.recipes import runs

RATE = runs.RATE
RECIPES = {"ctc": "CTC/conmamba_tiny.yaml", "s2s": "S2S/conmambamamba_tiny.yaml"}
QUICK = {
    "lr_model": 1.0e-2,
    "n_warmup_steps": 20,
    "max_batch_length_train": 4,
    "d_model": 32,
    "dropout": 0,
    "speeds": "[100]",
    "fea_augment": "{augment_prob: 0.0}",
}
# Enough for texts that differ, and for an average of two checkpoints.
OPTIONS = {"ctc": QUICK | {"number_of_epochs": 3}, "s2s": {"number_of_epochs": 2}}
# Until it hears the tones without an error.
LEARNS = QUICK | {"number_of_epochs": 8}
LEARNS_S2S = {k: v for k, v in LEARNS.items() if k != "lr_model"} | {
    "number_of_epochs": 16,
    "lr_adam": 1.0e-2,
    "test_beam_size": 4,
}
SENTENCES = ["ABE BEAD CAB", "DEAF FACE", "BED CAB BEAD", "FACE BED ABE", "CAB DEAF", "BEAD ABE"]


def make_package(yaml_file, options):
    """Train and package: (training's output folder, package), until the tests end."""
    folder = Path(tempfile.mkdtemp(prefix="mamba-asr-package-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    runs.train(yaml_file, folder / "run", **options)
    return folder / "run", package(folder / "run", folder / "package")


@functools.cache
def trained(name):
    """One of RECIPES, trained a little: (training's output folder, package). Copy to change."""
    return make_package(RECIPES[name], OPTIONS[name])


@functools.cache
def hearing_package():
    """A CTC package that hears the tones without an error."""
    return make_package(RECIPES["ctc"], LEARNS)[1]


def said(text, before=0.0, after=0.0, noise=0.003, seed=0):
    parts = [np.zeros(int(before * RATE)), runs.speak(text), np.zeros(int(after * RATE))]
    x = np.concatenate(parts)
    return (x + noise * np.random.default_rng(seed).standard_normal(len(x))).astype(np.float32)


def hypotheses(run):
    """What a run's test stage heard: {utterance: text}, from its wer_<test set>.txt."""
    texts = {}
    for path in sorted(Path(run).glob("wer_*.txt")):
        lines = path.read_text(encoding="utf-8").splitlines()
        for i, line in enumerate(lines):
            if ", %WER " in line and line[0] != "<":
                words = [w.strip() for w in lines[i + 3].split(";")]
                texts[line.partition(",")[0]] = " ".join(w for w in words if w != "<eps>")
    return texts
