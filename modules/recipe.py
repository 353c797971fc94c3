"""What both training scripts do, in order: prepare, train, evaluate, sum up."""

import inspect
import math
import os
import shlex
import sys
import time
from pathlib import Path

import speechbrain as sb
import torch
from hyperpyyaml import resolve_references
from speechbrain.utils.distributed import if_main_process

from modules import launch
from modules.data import (
    eval_loader_options,
    hours,
    keep_audio,
    prepare_manifests,
    train_loader_options,
)
from modules.environment import commit, hardware
from modules.errors import UserError
from modules.lock import FolderLock
from modules.mixing import times_per_epoch
from modules.whole import whole


def run_recipe(argv, script, brain_class, dataio_prepare):
    """Run a recipe from its command line; `script` is that of its YAML files (`script_of`)."""
    locked(argv, script, lambda *started: run(*started, brain_class, dataio_prepare))


def script_of(hparams):
    """The training script that a YAML file is for."""
    if "lm" in hparams:
        return "train_LM.py"
    return "train_S2S.py" if "decoder" in hparams else "train_CTC.py"


def locked(argv, script, run):
    """Read a command line and call `run` with what `launch.start` gives, in a locked folder.

    UserError for another script's YAML file, before any work.
    """
    path, hparams, run_opts, overrides = launch.start(argv)
    if (wanted := script_of(hparams)) != script:
        raise UserError(f"{path} is a file for {wanted}, not for {script}; run {wanted} with it")
    lock = FolderLock(hparams["output_folder"])
    if not hparams["skip_train"]:  # an evaluation writes no checkpoints
        launch.on_main(lock.acquire)
    try:
        run(path, hparams, run_opts, overrides)
    finally:
        lock.release()


def run(path, hparams, run_opts, overrides, brain_class, dataio_prepare):
    """Run a recipe in an output folder of its own."""
    started = time.monotonic()
    # Its log is wanted from here on, its copy of the YAML file once nothing can be amiss.
    sb.create_experiment_directory(hparams["output_folder"])
    prepare_manifests(hparams)
    train, valid, tests = dataio_prepare(hparams)
    train_hours = hours(train, times_per_epoch(hparams, train))
    brain = brain_class(hparams, run_opts)
    brain.clock.since = started
    brain.check_start()
    launch.on_main(save_hyperparams, path, hparams, overrides)
    if not hparams["skip_train"]:
        keep_audio(train, valid)
        brain.fit(
            hparams["epoch_counter"],
            train,
            valid,
            train_loader_kwargs=train_loader_options(hparams, train),
            valid_loader_kwargs=eval_loader_options(
                hparams, valid, hparams["max_batch_length_val"]
            ),
        )
    brain.prepare_test()
    brain.test(tests, lambda dataset: eval_loader_options(hparams, dataset))
    if if_main_process():
        write_summary(hparams, brain, summary(path, hparams, brain, train_hours, tests), started)


def write_summary(hparams, brain, text, started):
    """Write and print what came of a run, and what it takes to do it again."""
    alone = (time.monotonic() - started) / 60  # an evaluation's
    text += origin(brain, alone if hparams["skip_train"] else brain.clock.minutes)
    (Path(hparams["output_folder"]) / "summary.txt").write_text(text, encoding="utf-8")
    print(text)


def save_hyperparams(path, hparams, overrides):
    """Write hyperparams.yaml, resolved; an evaluation leaves the training's own alone."""
    target = Path(hparams["output_folder"]) / "hyperparams.yaml"
    if hparams["skip_train"] and target.is_file():
        return
    with open(path, encoding="utf-8") as f:
        resolved = resolve_references(f, overrides).read()
    with whole(target) as beside:
        beside.write_text(f"# From {Path(path).absolute()}\n{resolved}", encoding="utf-8")


def heading(path, hparams, brain, amount):
    """A summary's first lines: model, device, and what it was trained with, `amount` an epoch."""
    parameters = sum(p.numel() for p in hparams["model"].parameters())
    return [
        "",
        f"model        {path} ({parameters / 1e6:.3f} M parameters)",
        f"device       {brain.device}, precision {brain.precision}",
        f"training     {amount} an epoch, {hparams['epoch_counter'].current} epochs, "
        f"{brain.optimizer_step} steps",
    ]


def summary(path, hparams, brain, train_hours, tests):
    """One screen: model, data, error rates, speed, files."""
    folder = Path(hparams["output_folder"])
    lines = [
        # An evaluation may be without what was learnt.
        *heading(path, hparams, brain, f"{train_hours:.2f} h" if train_hours else "unknown hours"),
        "",
        f"{'test set':<20}{'hours':>8}{'WER %':>9}{'CER %':>9}{'RTF':>9}",
    ]
    for name, rates in brain.results.items():
        lines.append(
            f"{name:<20}{hours(tests[name]):>8.2f}{rates['WER']:>9.2f}{rates['CER']:>9.2f}"
            f"{rates['RTF']:>9.4f}"
        )
        if "unread files" in rates:
            lines.append(f"  without {rates['unread files']} files that cannot be read (log.txt)")
    lines += [
        "",
        f"transcripts  {folder}/wer_<test set>.txt",
        f"log          {folder}/train_log.txt",
        f"checkpoints  {brain.checkpointer.checkpoints_dir}",
        "",
    ]
    return "\n".join(lines)


def origin(brain, minutes):
    """What it takes to do it again, as lines: command, commit, hardware, time."""
    duration = "unknown" if math.isnan(minutes) else f"{minutes:.1f} min"
    lines = [
        f"commit       {commit()}",
        f"hardware     {hardware(brain.device)}",
        f"time         {duration}",
        "",
    ]
    # Not when another program calls: its command line is not the recipe's.
    if Path(sys.argv[0]).name == Path(inspect.getfile(type(brain))).name:
        words = [*launcher(), Path(sys.argv[0]).name, *sys.argv[1:]]
        lines.insert(0, f"command      {shlex.join(words)}")
    return "\n".join(lines)


def launcher():
    """What started this process: python, or torchrun with as many processes."""
    if not torch.distributed.is_initialized():
        return ["python"]
    number = torch.distributed.get_world_size()
    here = int(os.environ.get("LOCAL_WORLD_SIZE", number))
    nodes = ["--nnodes", str(number // here)] if number > here else []
    return ["torchrun", *nodes, "--nproc-per-node", str(here)]
