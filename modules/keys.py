"""A recipe's keys, in a dict or as attributes; of one that is missing, the file that has it."""

import re
from pathlib import Path
from types import SimpleNamespace

from modules.errors import MissingKey

ROOT = Path(__file__).parents[1]


class Keys(dict):
    """A YAML file's keys and their values; MissingKey for one that is read and not there."""

    def __init__(self, path, values):
        super().__init__(values)
        self.path = path

    def __missing__(self, key):
        raise MissingKey(f"{self.path} lacks the key {key}; {remedy(key, self.keys())}")


class Attributes(SimpleNamespace):
    """`Keys` as attributes, as SpeechBrain's Brain has its hparams."""

    __slots__ = ("path",)  # vars() are the keys alone

    def __init__(self, keys):
        super().__init__(**keys)
        self.path = keys.path

    def __getattr__(self, name):
        return Keys(self.path, vars(self))[name]


def remedy(key, known):
    """Where to copy a key from: the file here that has it and is most like one of the known."""
    files = {p.relative_to(ROOT): keys_of(p) for p in sorted(ROOT.glob("hparams/*/*.yaml"))}
    having = [path for path, keys in files.items() if key in keys]
    if not having:
        return "begin with a file of hparams/ (docs/configuration.md)"
    return f"copy it from {min(having, key=lambda path: len(files[path] ^ known))}"


def keys_of(path):
    """The top-level keys of a YAML file, as text has them."""
    return set(re.findall(r"^(\w+):", Path(path).read_text(encoding="utf-8"), re.M))
