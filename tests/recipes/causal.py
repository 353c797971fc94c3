"""Models that hear the tones of `runs.speak` as they come, trained and packaged once a test run."""

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


def causal_package():
    """Folder of the causal model's package."""
    return package_of("CTC/conmamba_causal_tiny.yaml", 16)


def chunked_package():
    """Folder of the package of a model that sees 8 frames at a time and 2 after them."""
    return package_of("CTC/conmamba_chunked_tiny.yaml", 16, chunk_size=8, lookahead=2)


@functools.cache
def package_of(yaml_file, epochs, **options):
    folder = Path(tempfile.mkdtemp(prefix="mamba-asr-streaming-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    runs.train(yaml_file, folder / "run", **LEARNS | {"number_of_epochs": epochs} | options)
    return package(folder / "run", folder / "package")


def speech(number, gap=PAUSE):
    """Sentences, a pause after each, and their texts."""
    texts = [SENTENCES[i % len(SENTENCES)] for i in range(number)]
    parts = [said(t, after=gap, seed=i) for i, t in enumerate(texts)]
    return np.concatenate(parts), texts
