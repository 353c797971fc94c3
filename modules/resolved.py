"""A training's hyperparams.yaml as plain data: read as text, nothing in it is executed."""

import contextlib
import re
from pathlib import Path

import yaml

from modules.errors import UserError

TAGS = {"!new:": "new", "!name:": "factory"}
LARGEST = 1 << 16  # bytes of a file: the shipped ones have a sixth of that
MOST = 10_000  # nodes of a value, its aliases written out
DEEPEST = 100  # of its lists and mappings within each other, whatever depth Python recurses to
SEQUENCE, MAPPING = "tag:yaml.org,2002:seq", "tag:yaml.org,2002:map"


class PlainLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # the one in C bounds its depth
    """PyYAML's, to which 1e-3 is a number, as it is to HyperPyYAML: text by YAML 1.1."""


PlainLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


class ResolvedYAML:
    """A resolved HyperPyYAML file.

    `value(key)` is a top-level key as plain data, with objects as {"new" or "factory": class,
    argument: value}. Only `classes`, by their names, may be named; `where` is the file that lists
    them, for messages.
    """

    def __init__(self, path, classes, where):
        if (size := Path(path).stat().st_size) > LARGEST:
            raise UserError(f"{path} has {size} bytes; training writes less than {LARGEST}")
        try:
            root = yaml.compose(Path(path).read_text(encoding="utf-8"), Loader=PlainLoader)
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
            raise UserError(f"{path} is not a YAML file: {error}") from None
        if not isinstance(root, yaml.MappingNode) or not are_names(root):
            raise UserError(f"{path} holds no keys; give the file that training wrote")
        self.path, self.classes, self.where = path, classes, where
        self.nodes = {key.value: node for key, node in root.value}
        self.loader = yaml.SafeLoader("")

    def __contains__(self, key):
        return key in self.nodes

    def value(self, key, named=None):
        """A key as plain data; in it the values of other keys, `named` {name: key}, become
        {"part": name}.

        UserError when it is missing, or holds another class.
        """
        if key not in self.nodes:
            raise UserError(f"{self.path} lacks the key {key}; it is not this project's recipe")
        nodes = {id(self.nodes[k]): name for name, k in (named or {}).items() if k in self.nodes}
        self.left = MOST
        return self.plain(self.nodes[key], nodes, key)

    def plain(self, node, named, key, depth=0):
        if depth > DEEPEST:
            raise UserError(f"{self.path}: {key} is nested too deeply; write it plainly")
        self.left -= 1
        if self.left < 0:
            raise UserError(f"{self.path}: {key} holds over {MOST} values; write it plainly")
        if id(node) in named:
            return {"part": named[id(node)]}
        prefix = next((tag for tag in TAGS if node.tag.startswith(tag)), None)
        if prefix is not None:
            return self.plain_object(node, prefix, named, key, depth)
        if isinstance(node, yaml.SequenceNode) and node.tag == SEQUENCE:
            return [self.plain(n, named, key, depth + 1) for n in node.value]
        if isinstance(node, yaml.MappingNode) and node.tag == MAPPING and are_names(node):
            return {k.value: self.plain(v, named, key, depth + 1) for k, v in node.value}
        if isinstance(node, yaml.ScalarNode) and not node.tag.startswith("!"):
            with contextlib.suppress(yaml.YAMLError, ValueError):
                return self.loader.construct_object(node)
        raise UserError(f"{key} holds {node.tag}, which is no plain value; write the value")

    def plain_object(self, node, prefix, named, key, depth):
        name = node.tag.removeprefix(prefix)
        if name not in self.classes:
            raise UserError(
                f"{key} is made by {name}, which a package cannot hold; known are "
                f"{', '.join(self.classes)} ({self.where})"
            )
        if isinstance(node, yaml.SequenceNode) or not are_names(node):
            raise UserError(f"{key}: give the arguments of {name} by name")
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        values = {k.value: self.plain(v, named, key, depth + 1) for k, v in pairs}
        return {TAGS[prefix]: name} | values


def plain_values(path, *keys):
    """Plain values of a resolved file; None for a key that it lacks."""
    resolved = ResolvedYAML(path, (), "a plain value alone")
    return [resolved.value(key) if key in resolved else None for key in keys]


def are_names(node):
    """Whether the keys of a mapping, where a node is one, are plain names."""
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    return all(isinstance(key, yaml.ScalarNode) for key, _ in pairs)


def is_plain(node):
    """Whether a node makes no object: a scalar, or a list or mapping of such."""
    if node.tag.startswith("!"):
        return False
    if isinstance(node, yaml.MappingNode):
        return all(is_plain(value) for _, value in node.value)
    return not isinstance(node, yaml.SequenceNode) or all(map(is_plain, node.value))
