#!/usr/bin/env python3
"""Search the weights of a language model on the development set: python tune.py RUN --lm PATH"""

import argparse
import hashlib
import itertools
import sys
from pathlib import Path

import speechbrain as sb
import torch
from speechbrain.utils.metric_stats import ErrorRateStats
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import train_CTC
import train_S2S
from modules import launch
from modules.data import load_manifest
from modules.errors import UserError
from modules.language_model import check_units, load_language_model
from modules.recipe import script_of
from modules.search import CTCSearch
from modules.tensors import load_tensors
from modules.tokenizer import SubwordTokenizer
from modules.waveforms import Batch, Unread, read_audio

RECIPES = {"train_CTC.py": train_CTC, "train_S2S.py": train_S2S}
EXAMPLES = """
examples:
  python tune.py results/CTC/conmamba_small/3402 --lm 3-gram.arpa --lm_weight 0.3,0.6,0.9 \\
      --word_bonus 0,1,2
  python tune.py results/S2S/conmamba_small/3402 --lm results/LM/mamba/3402 \\
      --lm_weight 0.2,0.4,0.6 --ctc_weight_decode 0.2,0.4
  python tune.py RUN --save dev.pt                       # encode, where the GPU is
  python tune.py RUN --lm 3-gram.arpa --encoded dev.pt   # search, on any machine

RUN is a training's output folder. Its development set is encoded once, by the weights that the test
stage evaluates, and searched once for each combination. Nothing in RUN is changed. Test sets are
refused: weights that were chosen on them make their error rates mean nothing.
"""


def parser():
    p = argparse.ArgumentParser(
        description="Search language model and CTC weights on the development set.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("run", metavar="RUN", help="the output folder of a training")
    p.add_argument("--lm", metavar="PATH", help="CTC: n-gram, .arpa or .bin; S2S: train_LM.py's")
    for name, text in (
        ("lm_weight", "weights of the language model to try (0.2,0.4,0.6,0.8)"),
        ("word_bonus", "CTC: bonuses a word (the run's)"),
        ("ctc_weight_decode", "S2S: weights of CTC (the run's)"),
    ):
        p.add_argument(f"--{name}", type=numbers, metavar="A,B,...", help=text)
    p.add_argument("--splits", metavar="A,B", help="development splits (the run's dev_splits)")
    p.add_argument("--utterances", type=int, metavar="N", help="so many of them, evenly spread")
    p.add_argument("--beam", type=int, metavar="N", help="hypotheses kept (the run's)")
    p.add_argument(
        "--token_prune_min_logp",
        type=float,
        metavar="X",
        help="CTC: tokens below are not tried in a frame (the run's; with an n-gram try -4)",
    )
    p.add_argument("--device", help="cuda, cuda:N, mps or cpu (the best present)")
    p.add_argument("--save", metavar="FILE", help="write what was encoded")
    p.add_argument("--encoded", metavar="FILE", help="read it, and no audio")
    return p


def numbers(text):
    try:
        return [float(x) for x in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be numbers, such as 0.2,0.4") from None


def main(argv):
    arguments = parser().parse_args(argv)
    arguments.lm_weight = arguments.lm_weight or [0.2, 0.4, 0.6, 0.8]
    brain = load(arguments)
    joint = hasattr(brain.hparams, "decoder")
    check_options(arguments, joint)
    found = encoded(arguments, brain)
    if arguments.save:
        torch.save(found, arguments.save)
        print(f"wrote {arguments.save}: {len(found['texts'])} utterances")
    if arguments.lm is None:
        if not arguments.save:
            raise UserError("give --lm, the language model to search with, or --save")
        return
    tuned = tune_s2s(arguments, brain) if joint else tune_ctc(arguments, brain)
    report(list(measured(tuned, found, brain)), arguments, joint)


# ---- The run ----


def load(arguments):
    """The run's Brain with the averaged weights that its test stage evaluates."""
    run = Path(arguments.run)
    if not (run / "hyperparams.yaml").is_file():
        raise UserError(f"{run} holds no hyperparams.yaml; give the output_folder of a training")
    options = ["--skip_train=True", f"--output_folder={run}"]
    if (run / "save").is_dir():  # it may have been moved
        options += [f"--save_folder={run / 'save'}"]
    if arguments.device:
        options += [f"--device={arguments.device}"]
    _, hparams, run_opts, _ = launch.start([str(run / "hyperparams.yaml"), *options])
    if (script := script_of(hparams)) not in RECIPES:
        raise UserError(f"{run} is a run of {script}; give one of {' or '.join(RECIPES)}")
    recipe = RECIPES[script]
    if isinstance(hparams["tokenizer"], SubwordTokenizer):
        hparams["tokenizer"].load(Path(hparams["save_folder"]) / "tokenizer.model")
    brain = recipe.ASR(hparams, run_opts)
    brain.on_evaluate_start()
    brain.modules.eval()
    return brain


def check_options(arguments, joint):
    """UserError for what does not go with the run's kind of model, or is not there."""
    wrong = "word_bonus" if joint else "ctc_weight_decode"
    if getattr(arguments, wrong) is not None:
        raise UserError(f"--{wrong} has no meaning for {'an S2S' if joint else 'a CTC'} run")
    if arguments.lm and joint != Path(arguments.lm).is_dir():
        wanted = "the output folder of train_LM.py" if joint else "a word n-gram, .arpa or .bin"
        raise UserError(f"--lm {arguments.lm}: this run searches with {wanted}")
    for weight in arguments.ctc_weight_decode or []:
        if not 0 <= weight < 1:
            raise UserError(f"--ctc_weight_decode {weight} is not in [0, 1)")
    if arguments.encoded and arguments.save:
        raise UserError("--save and --encoded: give one of them")
    if arguments.save and not Path(arguments.save).absolute().parent.is_dir():
        raise UserError(f"--save {arguments.save}: there is no such folder; make it first")
    for name in ("utterances", "beam"):
        if (number := getattr(arguments, name)) is not None and number < 1:
            raise UserError(f"--{name} {number} must be at least 1")


def split_names(arguments, hparams):
    """The splits to search on; UserError for a test set."""
    names = arguments.splits.split(",") if arguments.splits else hparams.dev_splits
    for name in names:
        test = name in hparams.test_splits and name not in hparams.dev_splits
        if test or name.startswith("test"):
            raise UserError(
                f"--splits {name} is a test set: weights chosen on it make its error rate mean "
                f"nothing; use {', '.join(hparams.dev_splits)}"
            )
    return names


# ---- Encoding, once ----


def encoded(arguments, brain):
    """{"x": [log-probabilities or memory (T, ...)], "texts": [...], ...} on the CPU."""
    hparams = brain.hparams
    names = split_names(arguments, hparams)
    if arguments.encoded:
        return read_encoded(arguments.encoded, brain)
    rows = []
    for name in names:
        dataset = load_manifest(Path(arguments.run) / f"{name}.csv", vars(hparams))
        rows += dataset.data.values()
    rows = spread(rows, arguments.utterances)
    rows.sort(key=lambda row: float(row["duration"]))
    found = {"x": [], "texts": [], "joint": hasattr(hparams, "decoder"), "head": head(brain)}
    size = hparams.test_batch_size
    for start in progress(range(0, len(rows), size), "encoding"):
        encode(rows[start : start + size], brain, found)
    if not found["x"]:
        raise UserError(
            f"no recording of {', '.join(names)} can be read where the manifests in "
            f"{arguments.run} say; bring the audio back there"
        )
    return found


def head(brain):
    """A digest of the CTC head's weights: whose encodings these are."""
    return hashlib.sha256(brain.modules.ctc_head.weight.detach().cpu().numpy()).hexdigest()


def spread(rows, number):
    """So many of the rows, from the first to the last; None: all."""
    if number is None or number >= len(rows):
        return rows
    return [rows[i * len(rows) // number] for i in range(number)]


@torch.no_grad()
def encode(rows, brain, found):
    """Add one batch of a manifest's rows to what was found."""
    examples = []
    for row in rows:
        sig = read_audio(row["wav"], brain.hparams.sample_rate, float(row["duration"]))
        if isinstance(sig, Unread):
            print(f"left out: {sig.why}", file=sys.stderr)
        else:
            examples.append({"id": row["wav"], "sig": sig, "wrd": row["wrd"]})
    if not examples:
        return
    batch = Batch(examples).to(brain.device)
    x, lengths = brain.encode(*brain.features(batch, sb.Stage.TEST))
    if not found["joint"]:
        x = brain.modules.ctc_head(x).log_softmax(dim=-1)
    found["x"] += [y[:n].float().cpu() for y, n in zip(x, lengths.tolist(), strict=True)]
    found["texts"] += batch.wrd


def read_encoded(path, brain):
    """What --save wrote; UserError when it is none, or of another kind of model."""
    if not Path(path).is_file():
        raise UserError(f"--encoded {path} is no file; --save writes one")
    found = load_tensors(path)
    if not isinstance(found, dict) or found.keys() != {"x", "texts", "joint", "head"}:
        raise UserError(f"--encoded {path} is not what --save writes")
    if found["joint"] != hasattr(brain.hparams, "decoder"):
        raise UserError(f"--encoded {path} is of another kind of model than the run")
    width = brain.modules.ctc_head.weight.shape[0 if not found["joint"] else 1]
    if any(x.shape[-1] != width for x in found["x"]):
        raise UserError(f"--encoded {path} is of a model of another size than the run's")
    if found["head"] != head(brain):
        raise UserError(
            f"--encoded {path} is of other weights than {brain.hparams.output_folder} has now; "
            "write it again with --save"
        )
    return found


# ---- Searching, often ----


def tune_ctc(arguments, brain):
    """Yield ({option: value} or None without a language model, search) for each combination."""
    hparams = brain.hparams
    prune = arguments.token_prune_min_logp
    settings = {
        "beam_size": arguments.beam or hparams.test_beam_size,
        "beam_prune_logp": hparams.beam_prune_logp,
        "token_prune_min_logp": hparams.token_prune_min_logp if prune is None else prune,
    }
    yield None, CTCSearch(brain.tokenizer.labels, **settings)
    search = CTCSearch(brain.tokenizer.labels, kenlm_model_path=arguments.lm, **settings)
    bonuses = arguments.word_bonus or [getattr(hparams, "word_bonus", 1.5)]
    for weight, bonus in itertools.product(arguments.lm_weight, bonuses):
        search.weigh(weight, bonus)
        yield {"lm_weight": weight, "word_bonus": bonus}, search


def tune_s2s(arguments, brain):
    """As `tune_ctc`."""
    hparams, folder = brain.hparams, Path(arguments.lm)
    check_units(folder / "tokenizer.ckpt", Path(hparams.save_folder) / "tokenizer.model")
    lm = load_language_model(hparams.make_lm, folder).to(brain.device)
    search = hparams.test_search
    search.beam_size = arguments.beam or search.beam_size

    def run(memory, lengths):
        ids, _ = search(memory.to(brain.device), lengths.to(brain.device))
        return [brain.tokenizer.decode(i) for i in ids]

    weights = arguments.ctc_weight_decode or [search.ctc_weight]
    for search.ctc_weight in weights:
        search.language_model = None
        yield {"ctc_weight_decode": search.ctc_weight}, run
        for weight in arguments.lm_weight:
            search.use_language_model(lm, weight, hparams.temperature_lm)
            yield {"lm_weight": weight, "ctc_weight_decode": search.ctc_weight}, run


def measured(tuned, found, brain):
    """Yield (options, WER, CER) for each combination."""
    size = brain.hparams.test_batch_size
    for options, search in tuned:
        wer, cer = ErrorRateStats(), ErrorRateStats(split_tokens=True)
        name = " ".join(f"{k} {v:g}" for k, v in (options or {}).items()) or "without"
        for start in progress(range(0, len(found["x"]), size), name):
            xs = found["x"][start : start + size]
            lengths = torch.tensor([len(x) for x in xs])
            heard = search(pad_sequence(xs, batch_first=True), lengths)
            said = found["texts"][start : start + size]
            ids = range(start, start + len(xs))
            for metric in (wer, cer):
                metric.append(ids, [t.split() for t in heard], [t.split() for t in said])
        yield options or {}, wer.summarize("error_rate"), cer.summarize("error_rate")


def report(rows, arguments, joint):
    """Print the table, the winner by word error rate, and the options that it takes."""
    names = ["lm_weight", "ctc_weight_decode" if joint else "word_bonus"]
    best = min((r for r in rows if "lm_weight" in r[0]), key=lambda r: r[1:])
    print("".join(f"{n:>20}" for n in names) + f"{'WER %':>10}{'CER %':>10}")
    for row in rows:
        cells = [f"{row[0][n]:g}" if n in row[0] else "-" for n in names]
        mark = "  <" if row is best else ""
        print("".join(f"{c:>20}" for c in cells) + f"{row[1]:>10.2f}{row[2]:>10.2f}{mark}")
    key = "pretrained_lm_tokenizer_path" if joint else "kenlm_model_path"
    options = {"no_lm": False, key: arguments.lm, **best[0]}
    if not joint and arguments.token_prune_min_logp is not None:
        options["token_prune_min_logp"] = arguments.token_prune_min_logp
    if arguments.beam:
        options["test_beam_size"] = arguments.beam
    print("\n" + " ".join(f"--{k} {v}" for k, v in options.items()))
    if any(row[1:] <= best[1:] for row in rows if "lm_weight" not in row[0]):
        print("the language model does not help here: without it the error rate is no higher")


def progress(steps, name):
    return tqdm(steps, desc=name, disable=None, leave=False, file=sys.stderr)


if __name__ == "__main__":
    launch.run(main, "tune.py", "", parser().format_help())
