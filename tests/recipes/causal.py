"""Models that hear the tones of `runs.speak` as they come, trained and packaged once a test run."""

import functools

import numpy as np

from tests.recipes.packages import LEARNS, SENTENCES, make_package, said

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
    return make_package(yaml_file, LEARNS | {"number_of_epochs": epochs} | options)[1]


def speech(number, gap=PAUSE):
    """Sentences, a pause after each, and their texts."""
    texts = [SENTENCES[i % len(SENTENCES)] for i in range(number)]
    parts = [said(t, after=gap, seed=i) for i, t in enumerate(texts)]
    return np.concatenate(parts), texts
