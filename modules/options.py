"""The YAML file's keys and the command line's options: reading, checking, describing them."""

import dataclasses
import difflib
import inspect
import math
import pydoc
import re
from pathlib import Path

import yaml
from hyperpyyaml import resolve_references
from ruamel.yaml import RoundTripRepresenter
from ruamel.yaml.error import YAMLError
from speechbrain.utils.run_opts import HELP_TEXTS, RunOptions

from modules.errors import UserError
from modules.keys import Keys, keys_of, remedy
from modules.objects import load_objects
from modules.resolved import TAGS, PlainLoader, is_plain


class Replacement:
    """A mapping that takes the place of the file's, into which HyperPyYAML would merge a dict."""

    def __init__(self, mapping):
        self.mapping = mapping


class Maker:
    """A class by HyperPyYAML's tag, with arguments, in place of the file's class and arguments."""

    def __init__(self, tag, arguments):
        self.name, self.arguments = tag, arguments  # HyperPyYAML reads what has a `tag`


RoundTripRepresenter.add_representer(
    Replacement, lambda representer, value: representer.represent_dict(value.mapping)
)
RoundTripRepresenter.add_representer(
    Maker, lambda representer, value: representer.represent_mapping(value.name, value.arguments)
)


class ValueLoader(PlainLoader):
    """Of a value on the command line: makes nothing, but keeps the tags of what makes objects."""


def read_maker(loader, _, node):
    bare = isinstance(node, yaml.ScalarNode) and not node.value
    return Maker(node.tag, {} if bare else loader.construct_mapping(node, deep=True))


for tag in TAGS:
    ValueLoader.add_multi_constructor(tag, read_maker)


class Wiring:
    """Stands for the value of a key that makes an object: the file's node."""

    def __init__(self, node):
        self.node = node


# SpeechBrain's run options that matter to users; the others work too.
SHOWN_OPTIONS = (
    "device precision eval_precision grad_accumulation_factor max_grad_norm debug debug_batches "
    "debug_epochs noprogressbar optimizer_step_limit ckpt_interval_minutes distributed_backend "
    "compile compile_mode"
)
# max_nonfinite_steps stands for the first two, torchrun for the third.
REPLACED_OPTIONS = ("nonfinite_patience", "skip_nonfinite_grads", "data_parallel_backend")
RUN_OPTIONS = {
    n: v for n, v in RunOptions().as_dict().items() if n in HELP_TEXTS and n not in REPLACED_OPTIONS
}
HELP = HELP_TEXTS | {
    "debug": "Two batches of two epochs and of each test set, to see that all of it runs, with "
    "checkpoints in a temporary folder.",
    "compile": "On CUDA: compile the layers with torch.compile.",
    "compile_mode": "default, or reduce-overhead: CUDA graphs too (training: one GPU).",
}
LIST_OPTIONS = ("jit_module_keys", "compile_module_keys")
PRECISIONS = ("fp32", "bf16", "fp16")
SECONDS = ("max_batch_length_train", "max_batch_length_val")  # may be fractions


def nearest(word, known):
    """' did you mean ...?' for the closest of the known words, or ''."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def yaml_path(name):
    """The YAML file, or a UserError naming the closest one there is."""
    if name.startswith("-"):
        raise UserError(f"the first argument is the YAML file, not {name}")
    if Path(name).is_file():
        return name
    known = [str(p) for p in Path("hparams").glob("*/*.yaml")]
    raise UserError(f"there is no file {name}{nearest(name, known)}")


def top_level(path, overrides=None):
    """The YAML file's top-level keys, references resolved; `Wiring` for what is no plain value."""
    try:
        with open(path, encoding="utf-8") as f:
            root = yaml.compose(resolve_references(f, overrides), Loader=PlainLoader)
    except (yaml.YAMLError, YAMLError, ValueError, KeyError, AttributeError) as error:
        if missing := re.match(r'The reference "(\w+)" is not valid', str(error)):
            raise UserError(
                f"{path} refers to <{missing[1]}>, which it lacks; "
                f"{remedy(missing[1], keys_of(path))}"
            ) from None
        raise UserError(f"{path} is not a HyperPyYAML file: {error}") from None
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{path} holds no keys")
    loader = yaml.SafeLoader("")
    values = Keys(path, {})
    for key, node in root.value:
        plain = is_plain(node)
        values[key.value] = loader.construct_object(node, deep=True) if plain else Wiring(node)
    return values


def load(path, overrides):
    """The YAML file's keys, with its objects made; UserError for what cannot be."""
    try:
        return Keys(path, load_objects(path, overrides))
    except OSError as error:  # of the checkpoints' folder, which its object makes
        where = error.filename or path
        raise UserError(f"{where}: {error.strerror or error}; give another place") from None


def read_options(argv, defaults):
    """The command line's run options and its overrides of the YAML file's keys."""
    run_words, overrides = [], {}
    known = {*defaults, *RUN_OPTIONS, *LIST_OPTIONS}
    for name, values in pair(argv[1:], known, defaults):
        if name in LIST_OPTIONS:
            run_words += [f"--{name}", *values]
        elif name in RUN_OPTIONS:
            check_option(name, values)
            run_words.append("=".join([f"--{name}", *values]))
        else:
            overrides[name] = read_value(name, values[0], defaults[name])
    _, run_opts, _ = RunOptions.from_command_line_args([argv[0], *run_words])
    if run_opts.optimizer_step_limit is not None:
        # SpeechBrain's parser leaves what has no default as text.
        limit = int(run_opts.optimizer_step_limit)
        run_opts = dataclasses.replace(run_opts, optimizer_step_limit=limit)
    # Keys that are run options too are taken by SpeechBrain's parser; the copy of the YAML file
    # in the output folder is to say what ran.
    overrides |= {k: run_opts[k] for k in run_opts.overridden_args if k in defaults}
    return run_opts, overrides


def owners(name, defaults):
    """The keys whose objects take an argument of that name."""
    found = []
    for key, value in defaults.items():
        tag = re.match("!(?:new|name):(.+)", value.node.tag if isinstance(value, Wiring) else "")
        try:
            parameters = inspect.signature(pydoc.locate(tag[1])).parameters if tag else ()
        except (TypeError, ValueError, pydoc.ErrorDuringImport):
            continue  # none such, or it does not tell
        if name in parameters:
            found.append(key)
    return found


def pair(words, known, defaults):
    """Words to options with their values: [(name, [value, ...])]; a flag has none."""
    pairs = []
    for word in words:
        if word.startswith("--"):
            name, equals, value = word.removeprefix("--").partition("=")
            if name not in known:
                remedy = nearest(name, sorted(known))
                if within := owners(name, defaults):
                    example = f'--{within[0]} "{{{name}: VALUE}}"'
                    remedy = f"; it is an argument of {' and '.join(within)}: {example}"
                raise UserError(f"unknown option --{name}{remedy}")
            pairs.append((name, [value] if equals else []))
        elif pairs and takes_value(*pairs[-1]):
            pairs[-1][1].append(word)
        elif pairs and RUN_OPTIONS.get(pairs[-1][0]) is False:
            raise UserError(f"--{pairs[-1][0]} is a switch and takes no value; leave {word} out")
        else:
            raise UserError(f"unexpected {word!r}; options look like --key value")
    for name, values in pairs:
        if not values and takes_value(name, values):
            raise UserError(f"--{name} needs a value")
    return pairs


def takes_value(name, values):
    """Whether an option that has these values takes one more."""
    return name in LIST_OPTIONS or (not values and RUN_OPTIONS.get(name) is not False)


def check_option(name, values):
    """SpeechBrain's parser answers a wrong value with a screenful; UserError instead."""
    default = 0 if name == "optimizer_step_limit" else RUN_OPTIONS[name]
    if default is False and values:
        raise UserError(f"--{name} is a switch and takes no value")
    if "precision" in name and values[0] not in PRECISIONS:
        raise UserError(f"{name}={values[0]!r} is unknown; use {', '.join(PRECISIONS)}")
    if is_number(default):
        try:
            type(default)(values[0])
        except ValueError:
            kind = "a whole number" if isinstance(default, int) else "a number"
            raise UserError(f"{name}={values[0]!r} must be {kind}, as {default}") from None


def read_value(key, text, default):
    """A value of its default's kind from the command line's text, or UserError."""
    if default is None:
        return None if text in ("", "null", "None", "~") else text
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "\"'"
    if isinstance(default, str) and not quoted:
        return text
    try:
        value = yaml.load(text, ValueLoader)
    except yaml.YAMLError:
        makes = isinstance(default, Wiring)
        example = "{a: !name:package.Class {}}" if makes else f"its default {default}"
        raise UserError(f"{key}={text!r} is no YAML; an example is {example}") from None
    if isinstance(default, Wiring):
        if not isinstance(value, dict | Maker):
            raise UserError(
                f"{key}={text!r}: {key} makes an object; give its arguments as "
                f'--{key} "{{name: value}}", or another class with all of its own, by the tag '
                "that the file has (docs/configuration.md)"
            )
        check_tags(key, value, default.node)
    elif isinstance(default, dict):
        if value is not None and not isinstance(value, dict):
            raise UserError(
                f"{key}={text!r} must be a mapping, such as {default}, which takes the place of "
                f"the file's; null: none"
            )
        return None if value is None else Replacement(value)
    elif isinstance(default, bool):
        if not isinstance(value, bool):
            raise UserError(f"{key}={text!r} must be True or False")
    elif is_number(default):
        value = as_number(value)
        if not is_number(value) or math.isnan(value):
            raise UserError(f"{key}={text!r} must be a number, as its default {default}")
        if isinstance(default, int) and key not in SECONDS:
            if math.isinf(value) or value != int(value):
                raise UserError(f"{key}={text} must be a whole number, as its default {default}")
            value = int(value)
    elif isinstance(default, list) and not isinstance(value, list):
        raise UserError(f'{key}={text!r} must be a list, such as --{key} "[{text}]"')
    return value


def check_tags(key, value, node):
    """UserError for a value's !new: where the file's node has !name:, or the other way round."""
    if isinstance(value, Maker):
        given, wanted = (re.match("!new:|!name:|", tag)[0] for tag in (value.name, node.tag))
        if wanted and given != wanted:
            kinds = {"!new:": "an object", "!name:": "a factory"}
            raise UserError(
                f"{key}={value.name} makes {kinds[given]}, where {kinds[wanted]} is expected; "
                f"write {wanted}{value.name.removeprefix(given)}"
            )
        # Another class's arguments are its own.
        value = value.arguments if value.name == node.tag else {}
    if isinstance(value, dict) and isinstance(node, yaml.MappingNode):
        for name, below in node.value:
            check_tags(f"{key}.{name.value}", value.get(name.value), below)


def is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool)


def as_number(value):
    """What is text to YAML and a number to Python's float, such as inf."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def describe(path, defaults):
    """The keys of one YAML file with defaults, and SpeechBrain's run options."""
    lines = [f"Keys of {path} and their defaults (docs/configuration.md explains each):\n"]
    for key, value in defaults.items():
        if not isinstance(value, Wiring):
            lines.append(f"  --{key:<28} {value}")
    lines.append("\nRun options:\n")
    lines += [f"  --{name:<28} {HELP[name]}" for name in SHOWN_OPTIONS.split()]
    return "\n".join(lines)
