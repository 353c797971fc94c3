"""A YAML file to the objects that it names; of one that cannot be made, its key is told."""

import re
import traceback
from pathlib import Path

import ruamel.yaml
from hyperpyyaml import load_hyperpyyaml

from modules.errors import UserError, out_of_memory

HERE = Path(__file__).parent
# What constructors raise for arguments that they do not take. All else is a mistake of the code's
# own, and keeps its stack trace.
REFUSALS = (TypeError, ValueError, AssertionError, ImportError)


class NotMadeError(UserError):
    """An object cannot be made of what the file says."""


class NamingLoader(ruamel.yaml.Loader):
    """HyperPyYAML's default, whose errors name the key, the class and the arguments."""

    def construct_document(self, node):
        self.root = node
        return super().construct_document(node)

    def construct_object(self, node, *args, **kwargs):
        try:
            return super().construct_object(node, *args, **kwargs)
        except REFUSALS as error:
            if not node.tag.startswith("!"):
                raise
            raise NotMadeError(self.told(node, error)) from error
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            raise NotMadeError(self.told(node, MemoryError("not enough memory"))) from error

    def told(self, node, error):
        """What was to be made, why it is not, and of what."""
        key = next(k.value for k, v in self.root.value if holds(v, node))
        # HyperPyYAML puts words of its own before those of a TypeError.
        why = str(error.args[-1] if error.args else type(error).__name__).rstrip(".")
        frames = traceback.extract_tb(error.__traceback__)
        ours = [f for f in frames if HERE in Path(f.filename).parents and f.filename != __file__]
        if ours and ours[-1] is frames[-1] and isinstance(error, ValueError):
            return f"{key}: {why}"  # a check of ours, which says it all
        if ours:
            why += f" ({Path(ours[-1].filename).relative_to(HERE.parent)}:{ours[-1].lineno})"
        pairs = node.value if isinstance(node, ruamel.yaml.MappingNode) else []
        given = [f"{k.value}={v.value}" for k, v in pairs if is_plain_scalar(v)]
        text = f"{key} cannot be made by {node.tag.partition(':')[2]}: {why}"
        return f"{text}; it is given {', '.join(given)}" if given else text


def load_objects(path, overrides):
    """{key: value or object} of a HyperPyYAML file; UserError where one cannot be made."""
    try:
        with open(path, encoding="utf-8") as file:
            return load_hyperpyyaml(file, overrides, loader=NamingLoader)
    except NotMadeError as error:
        raise UserError(f"{path}: {error}{keys_behind(path, str(error))}") from error.__cause__
    except (ValueError, KeyError) as error:  # HyperPyYAML's own words about an override
        if isinstance(error, KeyError) and not str(error.args[0]).startswith("Override "):
            raise
        raise UserError(f"{path}: {' '.join(map(str, error.args))}") from error


def keys_behind(path, told):
    """'; num_heads is set by --nhead': the arguments in an error whose keys have other names."""
    text = Path(path).read_text(encoding="utf-8")
    why = told.partition("; it is given")[0]
    made = re.match(r"\w+", why)[0]
    part = re.search(rf"^{made}:.*\n((?:[ #].*\n|\n)*)", text, re.MULTILINE)  # what is indented
    named = dict(re.findall(r"(\w+): !ref <(\w+)>", part[1])) if part else {}
    return "".join(
        f"; {argument} is set by --{key}"
        for argument, key in named.items()
        if argument != key and f" {argument}=" in why
    )


def holds(node, wanted):
    """Whether a node is the wanted one, or has it below it."""
    if node is wanted or not isinstance(node.value, list):
        return node is wanted
    pairs = node.value if isinstance(node, ruamel.yaml.MappingNode) else [(n,) for n in node.value]
    return any(holds(value, wanted) for *_, value in pairs)


def is_plain_scalar(node):
    return isinstance(node, ruamel.yaml.ScalarNode) and not node.tag.startswith("!")
