"""A training's output folder: error rates, log, settings, whatever of them is there."""

import re
from functools import cached_property
from pathlib import Path

import yaml

from inference.report.alignments import read_alignments
from modules.errors import UserError

ORIGIN = ("command", "commit", "hardware", "time")  # lines of summary.txt


class Run:
    """One folder; its files are read when they are asked for."""

    def __init__(self, path):
        self.path = Path(path)
        if not self.path.is_dir():
            raise UserError(f"there is no folder {path}; give the output_folder of a training")

    @cached_property
    def test_sets(self):
        """{test set: utterances, by id}; UserError when there is none."""
        files = sorted(self.path.glob("wer_*.txt"))
        if not files:
            raise UserError(
                f"{self.path} holds no wer_<test set>.txt; give the output_folder of a training "
                "that went through its test stage"
            )
        sets = {p.stem.removeprefix("wer_"): read_alignments(p) for p in files}
        return {name: sorted(found, key=lambda u: u.id) for name, found in sets.items()}

    @cached_property
    def log(self):
        """train_log.txt: (epochs [{name: number}], {test set: {name: number}})."""
        path = self.path / "train_log.txt"
        if not path.is_file():
            return [], {}
        return read_log(path.read_text(encoding="utf-8", errors="replace"))

    @cached_property
    def settings(self):
        """The plain top-level keys of hyperparams.yaml, which may be missing: then none."""
        path = self.path / "hyperparams.yaml"
        return plain_keys(path) if path.is_file() else {}

    @cached_property
    def recipe(self):
        """'CTC/conmamba_small.yaml', from the first line of hyperparams.yaml; None without."""
        path = self.path / "hyperparams.yaml"
        if not path.is_file():
            return None
        with open(path, encoding="utf-8", errors="replace") as file:
            found = re.match(r"# From (\S.*\S)\s*$", file.readline())
        return "/".join(Path(found[1]).parts[-2:]) if found else None

    @cached_property
    def summary(self):
        """summary.txt's lines 'name   value': {name: text}."""
        path = self.path / "summary.txt"
        if not path.is_file():
            return {}
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        pairs = (re.match(r"([a-z]+) {2,}(\S.*)$", line) for line in lines)
        found = {p[1]: p[2].strip() for p in pairs if p}
        if "--skip_train" in found.get("command", ""):  # it tells of an evaluation
            found = {k: v for k, v in found.items() if k not in ORIGIN}
        return {k: v for k, v in found.items() if not v.startswith("unknown")}

    @property
    def steps(self):
        """Optimiser steps; None where neither log nor summary tells."""
        if self.log[0] and "steps" in self.log[0][-1]:
            return int(self.log[0][-1]["steps"])
        found = re.search(r"(\d+) steps", self.summary.get("training", ""))
        return int(found[1]) if found else None

    def dev_rates(self):
        """Mean validation rates of the epochs that the test stage averages: {"WER": ...}.

        Those are the `avg_checkpoints` best, by ACC where it is logged and else by WER. {} where
        the log has no epochs, or hyperparams.yaml does not tell how many were averaged.
        """
        number, epochs = self.settings.get("avg_checkpoints"), self.log[0]
        ranked = [e for e in epochs if "valid ACC" in e]
        if ranked:
            ranked.sort(key=lambda e: (e["valid ACC"], e["epoch"]), reverse=True)
        else:
            ranked = [e for e in epochs if "valid WER" in e]
            ranked.sort(key=lambda e: (e["valid WER"], -e["epoch"]))
        if not number or not ranked:
            return {}
        best = ranked[:number]
        names = [n for n in ("WER", "CER", "ACC") if any(f"valid {n}" in e for e in best)]
        values = {n: [e[f"valid {n}"] for e in best if f"valid {n}" in e] for n in names}
        return {n: sum(v) / len(v) for n, v in values.items()}


def runs_of(folders):
    """Runs of folders, each a run or a folder of runs."""
    found = []
    for folder in map(Path, folders):
        if not is_run(folder) and folder.is_dir():
            inside = sorted((p for p in folder.iterdir() if is_run(p)), key=natural)
            found += [Run(p) for p in inside] or [Run(folder)]
        else:
            found.append(Run(folder))
    return found


def is_run(folder):
    names = ("hyperparams.yaml", "train_log.txt", "summary.txt")
    return any((folder / name).is_file() for name in names) or any(folder.glob("wer_*.txt"))


def natural(path):
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


def read_log(text):
    """Lines 'epoch: 1, lr: 1.0e-3 - train loss: 2.0 - valid WER: 90.1', and those of test sets.

    A run that went on writes an epoch again: the later line holds. A line that is cut off, as the
    last one of a run that was killed, is left out.
    """
    epochs, tests = {}, {}
    for line in text.split("\n")[:-1]:
        pairs = dict(
            pair.rpartition(": ")[::2] for part in line.split(" - ") for pair in part.split(", ")
        )
        name = pairs.pop("test set", None)
        try:
            numbers = {key: float(value) for key, value in pairs.items()}
        except ValueError:
            continue
        if name is not None:
            tests[name] = numbers
        elif "epoch" in numbers:
            epochs[int(numbers["epoch"])] = numbers
    return [epochs[n] for n in sorted(epochs)], tests


def plain_keys(path):
    """A YAML file's top-level keys that are numbers, text or lists of them; nothing is executed."""
    try:
        root = yaml.compose(Path(path).read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not a YAML file: {error}") from None
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{path} holds no keys; give the file that training wrote")
    loader, found = yaml.SafeLoader(""), {}
    for key, node in root.value:
        parts = node.value if isinstance(node, yaml.SequenceNode) else [node]
        if all(isinstance(n, yaml.ScalarNode) and n.tag[0] != "!" for n in [*parts, key]):
            try:
                found[key.value] = loader.construct_object(node, deep=True)
            except (yaml.YAMLError, ValueError):
                continue
    return found


def same_utterances(runs, test_set):
    """[utterances of each run] of one test set; UserError unless they are the same sentences."""
    for run in runs:
        if test_set not in run.test_sets:
            raise UserError(
                f"{run.path} holds no wer_{test_set}.txt; it has {', '.join(run.test_sets)}"
            )
    found = [run.test_sets[test_set] for run in runs]
    sentences = {u.id: u.reference for u in found[0]}
    for run, utterances in zip(runs, found, strict=True):
        other = {u.id: u.reference for u in utterances}
        wrong = sorted(k for k in sentences.keys() | other if sentences.get(k) != other.get(k))
        if wrong:
            raise UserError(
                f"{run.path} and {runs[0].path} have other sentences in {test_set}: {len(wrong)} "
                f"differ, {wrong[0]} first; runs can be compared on the same test set only"
            )
    return found
