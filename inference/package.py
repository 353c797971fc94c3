"""A training's output folder to a package: one folder with all that transcribing needs."""

import csv
import json
import math
import os
import shutil
import subprocess
from pathlib import Path

from inference.card import model_card
from inference.files import NGRAM
from inference.recognizer import Recognizer
from inference.resolved import Resolved, configuration
from inference.snapshot import ROOT, copy_code
from inference.speechbrain_parts import hyperparams
from inference.windows import SHORTEST
from modules.checkpoints import average, best, list_checkpoints, newest, resumable
from modules.errors import UserError
from modules.language_model import read_description
from modules.tensors import save_tensors

# All that a package may hold; the last two come with its use.
FILES = {"model.ckpt", "normalizer.ckpt", "tokenizer.ckpt", "lm.ckpt", NGRAM, "config.json"}
FILES |= {"hyperparams.yaml", "interface.py", "src", "LICENSE", "README.md"}
FILES |= {"__pycache__", ".DS_Store"}


def package(run, output, overwrite=False, use_lm=True):
    """Write the package of a training's output folder; returns its path.

    It is written beside `output`, loaded once to see that it is whole, then renamed: `output` is
    never half a package. UserError for whatever is missing or does not fit.
    """
    run, output = Path(run), Path(output).absolute()
    check_run(run)
    check_output(output, overwrite)
    resolved = Resolved(run / "hyperparams.yaml")
    config = configuration(resolved, use_lm) | heard_lengths(run, resolved)
    found = checkpoints(run, resolved)
    # The folder that a language model came from may have said how it is built.
    description = read_description(language_model_of(run, found))
    if description and "language_model" in config["parts"]:
        description["factory"] = description.pop("new")
        config["parts"]["language_model"] = description
    output.parent.mkdir(parents=True, exist_ok=True)
    beside = output.with_name(f".{output.name}.partial-{os.getpid()}")
    try:
        beside.mkdir()
        write(beside, run, resolved, config, found)
        recognizer = Recognizer.from_folder(beside, device="cpu")
        card = model_card(run, resolved, config, recognizer.model, commit())
        (beside / "README.md").write_text(card, encoding="utf-8")
        put(beside, output)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return output


def check_run(run):
    """UserError unless a folder holds a training's hyperparams.yaml."""
    if not run.is_dir():
        raise UserError(f"there is no folder {run}; give the output_folder of a training")
    if (run / "config.json").is_file():
        raise UserError(
            f"{run} is a package already, which can be copied as it is; to make another, give the "
            "output_folder of a training, results/CTC/conmamba_large/3402 for instance"
        )
    if not (run / "hyperparams.yaml").is_file():
        raise UserError(
            f"{run} holds no hyperparams.yaml; give the output_folder of a training, "
            "results/CTC/conmamba_large/3402 for instance"
        )


def check_output(output, overwrite):
    """UserError when the output exists, unless it is a package that may go, and nothing else."""
    if not output.exists():
        return
    if not overwrite:
        raise UserError(f"{output} exists; give --overwrite, or another --output")
    if not is_package(output):
        raise UserError(f"{output} is no package, so it is not overwritten; give another --output")
    if others := sorted(p.name for p in output.iterdir() if p.name not in FILES):
        raise UserError(
            f"{output} holds {', '.join(others[:5])}, which no package has and --overwrite would "
            "delete; move it elsewhere, or give another --output"
        )


def is_package(folder):
    """Whether a folder holds one, of whatever format; others have a config.json too."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    ours = isinstance(config, dict) and {"format", "parts"} <= config.keys()
    return ours and (folder / "model.ckpt").is_file()


def heard_lengths(run, resolved):
    """How long the utterances were that the run met, seconds, rounded up.

    whole_seconds : the longest of all, the test sets' included: it is transcribed as in the test
    stage; window_seconds : the 95th percentile in training, what long recordings are cut to, for
    a model hears badly what is much longer than all that it has learnt from.
    Without manifests: nothing, and the recogniser's own numbers hold.
    """
    train = durations(run / "train.csv")
    if not train:
        return {}
    splits = [*resolved.value("dev_splits"), *resolved.value("test_splits")]
    longest = max(train[-1:] + [x for name in splits for x in durations(run / f"{name}.csv")])
    return {
        "whole_seconds": max(SHORTEST, math.ceil(longest)),
        "window_seconds": max(SHORTEST, math.ceil(train[int(0.95 * len(train))])),
    }


def durations(manifest):
    """The lengths of a manifest's utterances, ascending; none where there is no such file."""
    try:
        with open(manifest, encoding="utf-8", newline="") as file:
            return sorted(float(row["duration"]) for row in csv.DictReader(file))
    except FileNotFoundError:
        return []


def checkpoints(run, resolved):
    """The run's checkpoints, found where the test stage finds them."""
    # A folder that was moved holds its checkpoints still.
    save = run / "save"
    found = list_checkpoints(save if save.is_dir() else resolved.value("save_folder"))
    resume = resolved.value("resume")
    if not found and resume:
        found = resumable(resume)
    if not found:
        raise UserError(f"there is no checkpoint in {save}; train first, at least one epoch")
    return found


def write(folder, run, resolved, config, found):
    """Fill a folder: weights, statistics, tokenizer, configuration, code."""
    save_tensors(weights_of(resolved, config, found), folder / "model.ckpt")
    shutil.copyfile(newest(found).paramfiles["normalizer"], folder / "normalizer.ckpt")
    save = newest(found).path.parent
    if "Subword" in config["parts"]["tokenizer"]["new"]:
        copy(save / "tokenizer.model", folder / "tokenizer.ckpt")
    if "language_model" in config["parts"]:
        copy(language_model_of(run, found) / "lm.ckpt", folder / "lm.ckpt")
    if "ngram" in config:
        copy_ngram(Path(str(resolved.value("kenlm_model_path"))), folder)
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    (folder / "hyperparams.yaml").write_text(hyperparams(config), encoding="utf-8")
    copy_code(folder / "src")
    shutil.copyfile(Path(__file__).with_name("interface.py"), folder / "interface.py")
    shutil.copyfile(ROOT / "LICENSE", folder / "LICENSE")


def language_model_of(run, found):
    """The folder with the test stage's language model."""
    # An evaluation with `resume` keeps its language model in its own folder.
    places = [run / "save", newest(found).path.parent]
    return next((p for p in places if (p / "lm.ckpt").is_file()), places[0])


def copy(source, target):
    if not source.is_file():
        raise UserError(f"{source} is missing; the model cannot transcribe without it")
    shutil.copyfile(source, target)


def copy_ngram(source, folder):
    """Take the run's n-gram along, as text: KenLM's binary is no file to take from strangers."""
    if source.suffix != ".arpa":
        raise UserError(
            f"kenlm_model_path={source}: a package holds an .arpa; evaluate with that, or give "
            "--no-lm to package the acoustic model alone"
        )
    copy(source, folder / NGRAM)


def weights_of(resolved, config, found):
    """The weights that the test stage evaluates: {"encoder....": tensor}."""
    metric, higher = ("ACC", True) if "decoder" in config["parts"] else ("WER", False)
    chosen = best(found, metric, higher, resolved.value("avg_checkpoints"))
    order, weights = resolved.model_order(), {}
    for key, weight in average(chosen).items():
        index, _, name = key.partition(".")
        if not index.isdigit() or int(index) >= len(order):
            raise UserError(f"weight {key!r} of {chosen[0].path} belongs to no part of `model`")
        weights[f"{order[int(index)]}.{name}"] = weight
    return weights


def put(beside, output):
    """Rename; an earlier package goes once the new one can take its place."""
    old = output.with_name(f".{output.name}.old-{os.getpid()}")
    if output.exists():
        os.rename(output, old)
    os.rename(beside, output)
    shutil.rmtree(old, ignore_errors=True)


def commit():
    """This code's commit, with "+ changes" when files differ from it; None where git has none."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        if head.returncode:
            return None
        status = [*git, "status", "--porcelain", "--untracked-files=no", "modules", "inference"]
        changed = subprocess.run(status, capture_output=True, text=True).stdout.strip()
    except OSError:
        return None
    return head.stdout.strip() + (" + changes" if changed else "")
