"""An output folder's hyperparams.yaml to plain data: read as text, nothing in it is executed."""

import contextlib
from pathlib import Path

import yaml

from inference.files import NGRAM
from inference.parts import CLASSES, FORMAT, MODEL, build
from modules.errors import UserError
from modules.tokenizer import SubwordTokenizer

PARTS = {  # the package's name of a part: the YAML file's
    "features": "compute_features",
    "normalize": "normalize",
    "frontend": "frontend",
    "encoder": "encoder",
    "ctc_head": "ctc_head",
    "decoder": "decoder",
    "seq_head": "seq_head",
    "tokenizer": "tokenizer",
}
TAGS = {"!new:": "new", "!name:": "factory"}
LARGEST = 1 << 16  # bytes of a file: the shipped ones have a sixth of that
MOST = 10_000  # nodes of a value, its aliases written out
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the one in C bounds its depth
SEQUENCE, MAPPING = "tag:yaml.org,2002:seq", "tag:yaml.org,2002:map"


class Resolved:
    """A resolved HyperPyYAML file.

    `value(key)` is a top-level key as plain data, with objects as `inference.parts` reads them.
    """

    def __init__(self, path):
        if (size := Path(path).stat().st_size) > LARGEST:
            raise UserError(f"{path} has {size} bytes; training writes less than {LARGEST}")
        try:
            root = yaml.compose(Path(path).read_text(encoding="utf-8"), Loader=LOADER)
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
            raise UserError(f"{path} is not a YAML file: {error}") from None
        if not isinstance(root, yaml.MappingNode) or not are_names(root):
            raise UserError(f"{path} holds no keys; give the file that training wrote")
        self.path = path
        self.nodes = {key.value: node for key, node in root.value}
        self.loader = yaml.SafeLoader("")

    def __contains__(self, key):
        return key in self.nodes

    def value(self, key, named=()):
        """A key as plain data; `named` parts in it become `{"part": name}`.

        UserError when it is missing, or holds a class that a package cannot name.
        """
        if key not in self.nodes:
            raise UserError(f"{self.path} lacks the key {key}; it is not this project's recipe")
        nodes = {id(self.nodes[PARTS[name]]): name for name in named if PARTS[name] in self.nodes}
        self.left = MOST
        try:
            return self.plain(self.nodes[key], nodes, key)
        except RecursionError:
            raise UserError(f"{self.path}: {key} is nested too deeply; write it plainly") from None

    def plain(self, node, named, key):
        self.left -= 1
        if self.left < 0:
            raise UserError(f"{self.path}: {key} holds over {MOST} values; write it plainly")
        if id(node) in named:
            return {"part": named[id(node)]}
        prefix = next((tag for tag in TAGS if node.tag.startswith(tag)), None)
        if prefix is not None:
            return self.plain_object(node, prefix, named, key)
        if isinstance(node, yaml.SequenceNode) and node.tag == SEQUENCE:
            return [self.plain(n, named, key) for n in node.value]
        if isinstance(node, yaml.MappingNode) and node.tag == MAPPING and are_names(node):
            return {k.value: self.plain(v, named, key) for k, v in node.value}
        if isinstance(node, yaml.ScalarNode) and not node.tag.startswith("!"):
            with contextlib.suppress(yaml.YAMLError, ValueError):
                return self.loader.construct_object(node)
        raise UserError(f"{key} holds {node.tag}, which is no plain value; write the value")

    def plain_object(self, node, prefix, named, key):
        name = node.tag.removeprefix(prefix)
        if name not in CLASSES:
            raise UserError(
                f"{key} is made by {name}, which a package cannot hold; known are "
                f"{', '.join(CLASSES)} (inference/parts.py)"
            )
        if isinstance(node, yaml.SequenceNode) or not are_names(node):
            raise UserError(f"{key}: give the arguments of {name} by name")
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        return {TAGS[prefix]: name} | {k.value: self.plain(v, named, key) for k, v in pairs}

    def model_order(self):
        """The names of the parts in the order of the checkpoint's numbers."""
        known = {id(self.nodes[PARTS[name]]): name for name in MODEL if PARTS[name] in self.nodes}
        try:
            (members,) = self.nodes["model"].value
            return [known[id(node)] for node in members.value]
        except (KeyError, ValueError, TypeError, AttributeError):
            raise UserError(
                f"{self.path}: `model` is not one list of {', '.join(MODEL)}; other parts cannot "
                "be packaged"
            ) from None


def are_names(node):
    """Whether the keys of a mapping, where a node is one, are plain names."""
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    return all(isinstance(key, yaml.ScalarNode) for key, _ in pairs)


def configuration(resolved, use_lm=True):
    """The package's configuration of a resolved YAML file: what transcribing needs, no more.

    use_lm: whether the test stage's language model goes along, if it has one.
    UserError for whatever is not as training writes it.
    """
    try:
        return read_configuration(resolved, use_lm)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise UserError(
            f"{resolved.path} is not as training wrote it: {type(error).__name__} {error}"
        ) from None


def read_configuration(resolved, use_lm):
    order = resolved.model_order()
    parts = {n: resolved.value(PARTS[n]) for n in PARTS if n not in MODEL or n in order}
    config = {"format": FORMAT, "sample_rate": resolved.value("sample_rate"), "parts": parts}
    if "decoder" in order:
        parts["search"] = resolved.value("test_search", order)
    else:
        parts["search"] = {
            "new": "modules.search.CTCSearch",
            "labels": labels(parts["tokenizer"], resolved),
            "beam_size": resolved.value("test_beam_size"),
            "beam_prune_logp": resolved.value("beam_prune_logp"),
            "token_prune_min_logp": resolved.value("token_prune_min_logp"),
        }
    if resolved.value("no_lm") or not use_lm:
        return config
    config["lm_weight"] = resolved.value("lm_weight")
    if "decoder" in order:
        parts["language_model"] = resolved.value("make_lm")
        config["lm_temperature"] = resolved.value("temperature_lm")
    else:
        config["ngram"] = NGRAM
        if "word_bonus" in resolved:
            parts["search"]["beta"] = resolved.value("word_bonus")
    return config


def labels(node, resolved):
    """The text of each token; units that were learnt are beside the checkpoints."""
    tokenizer = build(node, {})
    if isinstance(tokenizer, SubwordTokenizer):
        tokenizer.load(Path(resolved.path).parent / "save" / "tokenizer.model")
    return tokenizer.labels
