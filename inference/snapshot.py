"""The code that a package needs: the files of this project that `inference` imports, no others."""

import ast
import shutil
from pathlib import Path

ROOT = Path(__file__).parents[1]


START = ("inference/__init__.py", "inference/speechbrain_parts.py")


def needed_files(start=START, root=ROOT):
    """Paths below `root` that importing `start` can read, `start` and packages' files included."""
    found, left = set(), [root / name for name in start]
    while left:
        path = left.pop()
        if path in found:
            continue
        found.add(path)
        for name in imported(path):
            parts = name.split(".")
            for i in range(1, len(parts) + 1):
                place = root.joinpath(*parts[:i])
                left += [p for p in (place.with_suffix(".py"), place / "__init__.py") if p.exists()]
    return sorted(p.relative_to(root) for p in found)


def imported(path):
    """Dotted names that a file imports; of `from a import b` both a and a.b."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def copy_code(target, root=ROOT):
    """Copy what `inference` needs to a folder, in the same layout."""
    for path in needed_files(root=root):
        place = Path(target) / path
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / path, place)
