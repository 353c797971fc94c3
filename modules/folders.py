"""Files below a folder, through links too."""

import os
from pathlib import Path


def files_below(folder):
    """All files below a folder, in order of their paths; a folder that is linked counts once.

    `Path.rglob` passes such links over, and corpora are made of them.
    """
    found, seen = [], {os.path.realpath(folder)}
    for place, folders, names in os.walk(folder, followlinks=True):
        found += [Path(place, name) for name in names]
        there = [os.path.join(place, name) for name in folders]
        folders.clear()
        for path in sorted(there, key=os.path.islink):
            if (real := os.path.realpath(path)) not in seen:
                seen.add(real)
                folders.append(os.path.basename(path))
    return sorted(path for path in found if path.is_file())
