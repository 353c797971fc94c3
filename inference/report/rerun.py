"""A row's commands filled in and run again, and what came out held against what is written."""

import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np

from inference.report.folder import Run
from inference.report.rates import character_counts, estimate, word_counts
from inference.report.results import ROOT
from modules.errors import UserError


def filled(row, seed, data, output, more=()):
    """A row's commands as lists of words; `more` words go to the last one."""
    places = {"{seed}": str(seed), "{output}": str(output)}
    commands = []
    for command in row["commands"]:
        words = shlex.split(command)
        for old, new in places.items():
            words = [word.replace(old, new) for word in words]
        commands.append([corpus(word, Path(data)) for word in words])
    commands[-1] += more
    return commands


def corpus(word, data):
    """{data}/digits in the folder of all corpora, or that folder itself when it is digits."""
    if word.startswith("{data}/") and "/" not in (name := word.removeprefix("{data}/")):
        return str(data if data.absolute().name == name else data / name)
    return word.replace("{data}", str(data))


def run_commands(commands):
    """One after the other, in the checkout; UserError when one fails, with its exit status."""
    for words in commands:
        program = [sys.executable, *words[1:]] if words[0] == "python" else words
        try:
            done = subprocess.run(program, cwd=ROOT, check=False)
        except OSError as error:
            raise UserError(f"{words[0]} does not start: {error.strerror}") from None
        if done.returncode:
            raise UserError(
                f"exit status {done.returncode} of\n  {shlex.join(words)}\nits own message says "
                "why; the same command goes on from its newest checkpoint"
            )


def measured(folder):
    """The rates of a new run: {test set: {"WER", "CER"}}, percent."""
    rates = {}
    for name, utterances in Run(folder).test_sets.items():
        counts = {"WER": word_counts(utterances), "CER": character_counts(utterances)}
        rates[name] = {metric: estimate([c]).value for metric, c in counts.items()}
    return rates


def compare(row, seed, rates):
    """What to say of a rerun of one seed, [(text, whether it agrees or None)].

    A rate agrees when it lies in the interval that is written for that seed; where none is, between
    the lowest and the highest seed of the row; where there is one seed alone, nobody can say.
    """
    (run,) = (r for r in row["runs"] if r["seed"] == seed)
    for test_set, written in run["test"].items():
        for metric in ("WER", "CER"):
            if metric not in written:
                continue
            now = rates.get(test_set, {}).get(metric)
            name = f"seed {seed}, {test_set} {metric}"
            if now is None:
                yield f"{name}: written {written[metric]:.2f}; the rerun has none", False
                continue
            of_seeds = [r for r in rates_of(row, test_set, metric) if r is not None]
            limits, what = written.get(f"{metric}_interval"), "the 95 % interval"
            if limits is None and len(of_seeds) > 1:
                limits, what = (min(of_seeds), max(of_seeds)), "the row's seeds,"
            yield verdict(name, now, written[metric], limits, what)


def compare_means(row, every):
    """The same for the means, once all of a row's seeds have run: {seed: rates}."""
    for test_set, limits in row.get("intervals", {}).items():
        for metric, interval in limits.items():
            rates = [every[r["seed"]].get(test_set, {}).get(metric) for r in row["runs"]]
            written = rates_of(row, test_set, metric)
            if None in rates + written:  # `compare` has told what the rerun lacks
                continue
            name = f"all seeds, {test_set} {metric}"
            yield verdict(name, np.mean(rates), np.mean(written), interval, "the 95 % interval")


def rates_of(row, test_set, metric):
    """What is written, a seed each; None where it is not."""
    return [run["test"].get(test_set, {}).get(metric) for run in row["runs"]]


def verdict(name, now, written, limits, what):
    text = f"{name}: {now:.2f}, written {written:.2f}"
    if limits is None:
        return f"{text}; one seed and no interval, so no telling whether they agree", None
    low, high = limits
    inside = low - 0.005 <= now <= high + 0.005
    place = "within" if inside else "OUTSIDE"
    return f"{text}; {place} {what} {low:.2f} to {high:.2f}", bool(inside)
