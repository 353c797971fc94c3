"""A causal model that hears the tones of `runs.speak`, trained and packaged once a test run."""

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

import numpy as np

from inference.package import package
from tests.recipes import runs
from tests.test_transcribe import LEARNS, SENTENCES, said

# Pauses are of whole letters, as in the corpus.
PAUSE = 1.44


@functools.cache
def causal_package():
    """Folder of the package."""
    folder = Path(tempfile.mkdtemp(prefix="mamba-asr-causal-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    options = LEARNS | {"number_of_epochs": 16}
    runs.train("CTC/conmamba_causal_tiny.yaml", folder / "run", **options)
    return package(folder / "run", folder / "package")


def speech(number, gap=PAUSE):
    """Sentences, a pause after each, and their texts."""
    texts = [SENTENCES[i % len(SENTENCES)] for i in range(number)]
    parts = [said(t, after=gap, seed=i) for i, t in enumerate(texts)]
    return np.concatenate(parts), texts
