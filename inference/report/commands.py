"""The command of a run, from its hyperparams.yaml and the recipe that it began with."""

import io
import re
import shlex
import subprocess
from pathlib import Path

import yaml
from hyperpyyaml import resolve_references

from inference.report.results import ROOT
from modules.errors import UserError
from modules.resolved import is_plain

PLACES = {"data_folder": "{data}", "output_folder": "{output}", "seed": "{seed}"}
NONE = object()  # no value: None is one
SAFE = re.compile(r"[\w./:=+@%,{}-]+")


def command_of(run, commit=None):
    """(command with {data}, {output} and {seed}, problems): problems say what it does not repeat.

    The recipe is read as it was at the commit, where git has it.
    UserError when the folder does not tell its recipe.
    """
    if "command" in run.summary:
        return from_words(shlex.split(run.summary["command"]), run), []
    if run.recipe is None:
        raise UserError(
            f"{run.path} holds no hyperparams.yaml that begins with '# From ...', so its command "
            "is not known; give it with --command"
        )
    text = recipe_text(run.recipe, commit)
    overrides, problems = differences(text, (run.path / "hyperparams.yaml").read_text("utf-8"))
    overrides = dict.fromkeys(PLACES) | overrides  # these three come first
    words = ["python", f"train_{Path(run.recipe).parent}.py", f"hparams/{run.recipe}"]
    for key, value in overrides.items():
        words += [f"--{key}", placed(key, value, run)]
    problems += [
        f"--{key} {value} is a path of one machine; change it with --replace"
        for key, value in overrides.items()
        if key not in PLACES and str(value).startswith("/")
    ]
    return joined(words), problems


def placed(key, value, run):
    """A value as a word of the command line."""
    if key == "data_folder":
        value = run.settings.get(key, value)
        return f"{{data}}/{Path(value).name}" if value else "{data}"
    return PLACES.get(key) or written(value)


def from_words(words, run):
    """The command that summary.txt tells, with the places that stand for this machine's own."""
    out = ["python" if re.fullmatch(r"(.*/)?python[\d.]*", words[0]) else words[0]]
    given = set()
    for word in split_equals(words[1:]):
        key = out[-1].removeprefix("--") if out[-1].startswith("--") else None
        if key in PLACES:
            given.add(key)
            word = f"{{data}}/{Path(word).name}" if key == "data_folder" else PLACES[key]
        out.append(re.sub(r"^/.*/(hparams/\w+/\w+\.yaml)$", r"\1", word))
    for key in PLACES.keys() - given:
        out += [f"--{key}", placed(key, None, run)]
    return joined(out)


def split_equals(words):
    """--key=value as two words."""
    for word in words:
        name, equals, value = word.partition("=")
        yield from (name, value) if equals and name.startswith("--") else (word,)


def joined(words):
    return " ".join(map(quoted, words))


def quoted(word):
    """As a person would write it for a shell: double quotes where they are enough."""
    if SAFE.fullmatch(word) and not ("," in word and "{" in word):
        return word
    return shlex.quote(word) if set(word) & set('$`"\\!') else f'"{word}"'


def written(value):
    """A plain value as the training scripts read it."""
    if isinstance(value, str):
        return value
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")


def recipe_text(recipe, commit):
    """A shipped YAML file as the commit has it, or as it is here."""
    name = f"hparams/{recipe}"
    if commit and re.fullmatch(r"[0-9a-f]{7,40}", commit):
        done = subprocess.run(["git", "-C", str(ROOT), "show", f"{commit}:{name}"],
                              capture_output=True, text=True, check=False)  # fmt: skip
        if done.returncode == 0:
            return done.stdout
    try:
        return (ROOT / name).read_text(encoding="utf-8")
    except OSError:
        raise UserError(f"there is no {name} here; give the run's command with --command") from None


def differences(shipped, resolved):
    """Texts of a recipe and of a run's resolved copy -> (overrides {key: value}, problems).

    What other keys refer to comes first, for those follow from it.
    """
    wanted, overrides = nodes(resolved), {}

    def now():
        return nodes(resolve_references(io.StringIO(shipped), overrides or None).read())

    raw, found = nodes(shipped), now()
    first = [key for key in raw if key == "output_folder" or is_plain(raw[key])]
    for keys in (first, *([key] for key in raw)):
        changes = {
            key: changed(found[key], wanted[key])
            for key in keys
            if key in wanted and content(found[key]) != content(wanted[key])
        }
        changes = {k: v for k, v in changes.items() if v is not NONE and not k.startswith("__")}
        if changes:
            overrides |= changes
            found = now()
    problems = [f"the run knows no key {key}" for key in found.keys() - wanted]
    problems += [f"the recipe knows no key {key}" for key in wanted.keys() - found]
    problems += [
        f"{key} is not the recipe's, and no option makes it so"
        for key in found.keys() & wanted.keys()
        if content(found[key]) != content(wanted[key])
    ]
    return {key: overrides[key] for key in raw if key in overrides}, sorted(problems)


def nodes(text):
    """{top-level key: node}."""
    root = yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    if not isinstance(root, yaml.MappingNode):
        raise UserError("a recipe holds no keys; give the file that training wrote")
    return {key.value: node for key, node in root.value}


def content(node):
    """A node as data that compares by value, whatever its style."""
    if isinstance(node, yaml.SequenceNode):
        return node.tag, tuple(content(n) for n in node.value)
    if isinstance(node, yaml.MappingNode):
        return node.tag, frozenset((k.value, content(v)) for k, v in node.value)
    if node.tag.startswith("!"):
        return node.tag, node.value
    return yaml.SafeLoader("").construct_object(node)


def changed(now, wanted):
    """The value that an option has to give to make `wanted` of `now`; NONE where none does.

    Of an object those arguments that differ: {argument: value}.
    """
    if is_plain(wanted):
        return yaml.SafeLoader("").construct_object(wanted, deep=True)
    if now.tag != wanted.tag or not isinstance(wanted, yaml.MappingNode):
        return NONE
    before = {k.value: content(v) for k, v in now.value}
    differ = {k.value: v for k, v in wanted.value if before.get(k.value) != content(v)}
    if not differ or not all(map(is_plain, differ.values())):
        return NONE
    return {k: yaml.SafeLoader("").construct_object(v, deep=True) for k, v in differ.items()}
