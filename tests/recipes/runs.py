"""A tiny corpus that can be learnt, and training scripts run on it: in this process or alone."""

import atexit
import contextlib
import functools
import io
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile as sf

import train_CTC
import train_S2S
from modules import launch
from modules.data import eval_loader_options, prepare_manifests, train_loader_options

ROOT = Path(__file__).parents[2]
SCRIPTS = {"CTC": train_CTC, "S2S": train_S2S}
RATE = 16000
WORDS = ("ABE", "BEAD", "CAB", "DEAF", "FACE", "BED")

# The shipped files, shrunk: a step takes a few hundredths of a second.
TINY = {
    "precision": "fp32",
    "num_workers": 0,
    "train_splits": "[train]",
    "dev_splits": "[dev]",
    "test_splits": "[test-a, test-b]",
    "device": "cpu",
    "num_buckets": 4,
    "max_batch_length_train": 12,
    "max_batch_length_val": 12,
    "grad_accumulation_factor": 1,
    "avg_checkpoints": 2,
    "n_warmup_steps": 10,
    "d_model": 16,
    "d_ffn": 16,
    "num_encoder_layers": 1,
    "n_mels": 16,
    "n_fft": 400,
    "win_length": 25,
    "freq_drop_length_low": 1,
    "freq_drop_length_high": 3,
    "test_beam_size": 3,
}
TINY_S2S = {
    "output_neurons": 10,
    "token_type": "char",
    "num_decoder_layers": 1,
    "valid_beam_size": 2,
    "valid_search_interval": 1,
}
TINY_WORDS = {"output_neurons": 3 + len(WORDS), "token_type": "word"}
TINY_INTER = {"inter_ctc_layers": "[]"}  # of one layer there is none below the last
TINY_CNN = {"cnn_channels_1": 4, "cnn_channels_2": 4}
# Nothing random but the order of the utterances, and no statistics that grow batch by batch.
PLAIN = {
    "dropout": 0,
    "speeds": "[100]",
    "fea_augment": "{augment_prob: 0.0}",
    "normalize": "{norm_type: sentence}",
}


def speak(text):
    """A tone a letter, silence for a blank: 0.12 s each."""
    seconds = np.arange(int(0.12 * RATE)) / RATE
    tones = [
        np.zeros_like(seconds)
        if c == " "
        else 0.3 * np.sin(2 * np.pi * 350 * (ord(c) - 63) * seconds)
        for c in text
    ]
    return np.concatenate(tones)


def write_split(data, name, speaker, num_utterances, seed):
    """One speaker's chapter of a split in LibriSpeech layout."""
    folder = data / name / str(speaker) / "1"
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    lines = []
    for i in range(num_utterances):
        text = " ".join(random.choice(WORDS, size=random.integers(2, 4)))
        noise = 0.003 * random.standard_normal(int(0.12 * RATE) * len(text))
        sf.write(folder / f"{speaker}-1-{i:04d}.flac", speak(text) + noise, RATE)
        lines.append(f"{speaker}-1-{i:04d} {text}\n")
    (folder / f"{speaker}-1.trans.txt").write_text("".join(lines))


@functools.cache
def corpus():
    """Folder of a corpus made once a test run: 24 utterances to train, 4 in each other split."""
    data = Path(tempfile.mkdtemp(prefix="mamba-asr-corpus-"))
    atexit.register(shutil.rmtree, data, ignore_errors=True)
    write_split(data, "train", 1, 24, seed=1)
    for speaker, name in enumerate(("dev", "test-a", "test-b"), start=2):
        write_split(data, name, speaker, 4, seed=speaker)
    return data


def recipe_of(yaml_file):
    """CTC or S2S."""
    return Path(yaml_file).parent.name


def arguments(yaml_file, output_folder, **overrides):
    """The command line of a tiny run."""
    values = {**TINY, **TINY_CNN, "data_folder": corpus(), "output_folder": output_folder}
    if recipe_of(yaml_file) == "S2S":
        values |= TINY_S2S
    if "subword" in yaml_file or "digits" in yaml_file:
        values |= TINY_WORDS
    if "digits" in yaml_file or "hour" in yaml_file:
        values |= TINY_INTER
    values |= overrides
    options = [f"--{key}={value}" for key, value in values.items() if value is not None]
    return [str(ROOT / "hparams" / yaml_file), *options]


def command(yaml_file, output_folder, **overrides):
    """A command line for a process of its own."""
    script = str(ROOT / f"train_{recipe_of(yaml_file)}.py")
    return [sys.executable, script, *arguments(yaml_file, output_folder, **overrides)]


def torchrun(*options):
    """What starts several processes: `[*torchrun(...), *command(...)[1:]]`."""
    return [sys.executable, "-m", "torch.distributed.run", *map(str, options)]


def environment(**more):
    """One thread a process, no network, no leftover of a launcher."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more}


def heed_interrupts():
    """For a child, before it starts: who is started in the background ignores them."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run(command, timeout=120, preexec_fn=None, **more):
    """Run to its end: CompletedProcess with text."""
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=ROOT,
        env=environment(**more),
        preexec_fn=preexec_fn,
        check=False,
    )


@contextlib.contextmanager
def own_logging():
    """Undo what SpeechBrain does to a process: handlers of this run's files, an exception hook."""
    root = logging.getLogger()
    handlers, level, hook = root.handlers[:], root.level, sys.excepthook
    try:
        yield
    finally:
        for handler in set(root.handlers) - set(handlers):
            handler.close()
        root.handlers[:], sys.excepthook = handlers, hook
        root.setLevel(level)


def train(yaml_file, output_folder, *switches, **overrides):
    """A whole run in this process; returns what it printed."""
    argv = [*arguments(yaml_file, output_folder, **overrides), *switches]
    with own_logging(), contextlib.redirect_stdout(io.StringIO()) as printed:
        SCRIPTS[recipe_of(yaml_file)].main(argv)
    return printed.getvalue()


def build(yaml_file, output_folder, **overrides):
    """A run's parts before training: brain, train, valid, {test set: dataset}."""
    module = SCRIPTS[recipe_of(yaml_file)]
    _, hparams, run_opts, _ = launch.start(arguments(yaml_file, output_folder, **overrides))
    Path(output_folder).mkdir(parents=True, exist_ok=True)
    prepare_manifests(hparams)
    datasets = module.dataio_prepare(hparams)
    brain = module.ASR(hparams, run_opts)
    brain.noprogressbar = True
    return brain, *datasets


def fit(brain, train, valid):
    """Train as a run does."""
    hparams = vars(brain.hparams)
    brain.fit(
        hparams["epoch_counter"],
        train,
        valid,
        train_loader_kwargs=train_loader_options(hparams, train),
        valid_loader_kwargs=eval_loader_options(hparams, valid, hparams["max_batch_length_val"]),
    )


class Killed(BaseException):
    """Stands for a signal."""


def die_after(monkeypatch, batches):
    """Let CTC training be killed after so many batches."""
    whole, seen = train_CTC.ASR.fit_batch, iter(range(batches))

    def fit_batch(self, batch):
        if next(seen, None) is None:
            raise Killed
        return whole(self, batch)

    monkeypatch.setattr(train_CTC.ASR, "fit_batch", fit_batch)


def log_lines(output_folder):
    """train_log.txt's epochs: [{name: number}]."""
    lines = []
    for line in (Path(output_folder) / "train_log.txt").read_text().splitlines():
        if line.startswith("epoch"):
            pairs = line.replace(" - ", ", ").split(", ")
            lines.append({k: float(v) for k, v in (p.split(": ") for p in pairs)})
    return lines


def wait_for_epochs(output_folder, number, process, seconds=180):
    """Return once a process's log has so many epochs."""
    log, deadline = Path(output_folder) / "train_log.txt", time.monotonic() + seconds
    while not (log.is_file() and log.read_text().count("epoch:") >= number):
        assert process.poll() is None, "the run ended early"
        assert time.monotonic() < deadline, "the run takes too long"
        time.sleep(0.02)


def files_of(folder):
    """Every file below a folder with its bytes' checksum."""
    return {
        str(p.relative_to(folder)): hash(p.read_bytes())
        for p in sorted(Path(folder).rglob("*"))
        if p.is_file()
    }
