"""Files and folders that are there whole or not at all, whenever a run is killed."""

import contextlib
import os
import shutil
from pathlib import Path


@contextlib.contextmanager
def whole(path):
    """A path beside `path` to write to, which takes its place when the block ends well.

    A file there goes when it does not.
    """
    beside = Path(f"{path}.partial")
    try:
        yield beside
        os.replace(beside, path)
    except BaseException:
        if beside.is_file():
            beside.unlink()
        raise


@contextlib.contextmanager
def whole_folder(path):
    """The same of a folder that is not there yet; one that a killed run left beside is removed."""
    with whole(path) as beside:
        shutil.rmtree(beside, ignore_errors=True)
        try:
            beside.mkdir(parents=True)
            yield beside
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            raise
