"""Files that are there whole or not at all, whenever a run is killed."""

import contextlib
import os
from pathlib import Path


@contextlib.contextmanager
def whole(path):
    """A path beside `path` to write to, which takes its place when the block ends well."""
    beside = Path(f"{path}.partial")
    yield beside
    os.replace(beside, path)
