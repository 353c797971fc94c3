#!/usr/bin/env python3
"""Search the weights of a language model on the development set: python tune.py RUN --lm PATH"""

import json
from pathlib import Path

import train_CTC
import train_S2S
from modules import launch
from modules.checks import check_writable
from modules.command import argument_parser, count, number, plain_errors
from modules.errors import UserError
from modules.options import top_level
from modules.recipe import script_of
from modules.tokenizer import SubwordTokenizer
from modules.tuning import encoded, measured, read_encoded, save, tune_ctc, tune_s2s

# What is tried of a CTC run where nothing is said.
CTC_OPTIONS = {"word_bonus": [0.0, 1.0], "token_prune_min_logp": [-4.0, -8.0]}
RECIPES = {"train_CTC.py": train_CTC, "train_S2S.py": train_S2S}
EXAMPLES = """
examples:
  python tune.py results/CTC/conmamba_small/3402 --lm 3-gram.arpa --lm_weight 0.3,0.6,0.9 \\
      --word_bonus 0,1 --token_prune_min_logp -4,-8,-12
  python tune.py results/S2S/conmamba_small/3402 --lm results/LM/mamba/3402 \\
      --lm_weight 0.2,0.4,0.6 --ctc_weight_decode 0.2,0.4
  python tune.py RUN --save dev.pt                       # encode, where the GPU is
  python tune.py RUN --lm 3-gram.arpa --encoded dev.pt   # search, on any machine

RUN is a training's output folder. Its development set is encoded once, by the weights that the test
stage evaluates, and searched once for each combination. Nothing in RUN is changed. Test sets are
refused: weights that were chosen on them make their error rates mean nothing.

RUN must be your own, or of somebody you trust: its hyperparams.yaml can run any code, as it does
when it is given to a training script (docs/untrusted.md).
"""


def parser():
    p = argument_parser("Search language model and CTC weights on the development set.", EXAMPLES)
    p.add_argument("run", metavar="RUN", help="the output folder of a training")
    p.add_argument("--lm", metavar="PATH", help="CTC: n-gram, .arpa or .bin; S2S: train_LM.py's")
    for name, text in (
        ("lm_weight", "weights of the language model to try (0.2,0.4,0.6,0.8)"),
        ("word_bonus", "CTC: bonuses a word (0,1)"),
        ("token_prune_min_logp", "CTC: tokens below are not tried in a frame (-4,-8)"),
        ("ctc_weight_decode", "S2S: weights of CTC (the run's)"),
    ):
        p.add_argument(f"--{name}", type=numbers, metavar="A,B,...", help=text)
    p.set_defaults(lm_weight=[0.2, 0.4, 0.6, 0.8])
    p.add_argument("--splits", metavar="A,B", help="development splits (the run's dev_splits)")
    p.add_argument("--utterances", type=count, metavar="N", help="so many of them, evenly spread")
    p.add_argument("--beam", type=count, metavar="N", help="hypotheses kept (the run's)")
    p.add_argument("--device", help="cuda, cuda:N, mps or cpu (the best present)")
    p.add_argument("--save", metavar="FILE", help="write what was encoded")
    p.add_argument("--encoded", metavar="FILE", help="read it, and no audio")
    return p


def numbers(text):
    return [number(x) for x in text.split(",")]


def main():
    arguments = parser().parse_args()
    with plain_errors():
        run(arguments)


def run(arguments):
    """Encode or read, search, and print what was best."""
    brain = load(arguments.run, arguments.device)
    joint = hasattr(brain.hparams, "decoder")
    check_options(arguments, joint)
    names = split_names(arguments.splits, brain.hparams)
    if arguments.encoded:
        found = read_encoded(arguments.encoded, brain)
    else:
        found = encoded(brain, arguments.run, names, arguments.utterances)
    if arguments.save:
        save(found, arguments.save)
        print(f"wrote {arguments.save}: {len(found['texts'])} utterances")
    if arguments.lm is None:
        return
    weights, beam = arguments.lm_weight, arguments.beam
    if joint:
        tuned = tune_s2s(brain, Path(arguments.lm), weights, arguments.ctc_weight_decode, beam)
    else:
        grid = [getattr(arguments, name) or tried for name, tried in CTC_OPTIONS.items()]
        tuned = tune_ctc(brain, arguments.lm, weights, *grid, beam)
    report(list(measured(tuned, found, brain)), arguments, joint)


def load(run, device):
    """A run's Brain with the averaged weights that its test stage evaluates."""
    run = Path(run)
    path = run / "hyperparams.yaml"
    if not path.is_file():
        raise UserError(f"{run} holds no hyperparams.yaml; give the output_folder of a training")
    keys = top_level(path)
    if (script := script_of(keys)) not in RECIPES:
        raise UserError(f"{run} is a run of {script}; give one of {' or '.join(RECIPES)}")
    needed = ("skip_train", "output_folder", "save_folder", "checkpointer", "dev_splits")
    if missing := [key for key in needed if key not in keys]:
        raise UserError(
            f"{path} lacks the key {missing[0]}, so it is not what a training wrote; give the "
            f"output_folder of {' or '.join(RECIPES)}"
        )
    options = {"skip_train": True, "output_folder": run}
    if (run / "save").is_dir():  # it may have been moved
        options["save_folder"] = run / "save"
        options["checkpointer"] = json.dumps({"checkpoints_dir": str(run / "save")})
    # What is tried out is no run of the training's.
    options |= {key: False for key in ("use_wandb", "use_tensorboard") if key in keys}
    words = [f"--{key}={value}" for key, value in options.items()]
    words += [f"--device={device}"] if device else []
    _, hparams, run_opts, _ = launch.start([str(path), *words])
    recipe = RECIPES[script]
    if isinstance(hparams["tokenizer"], SubwordTokenizer):
        hparams["tokenizer"].load(Path(hparams["save_folder"]) / "tokenizer.model")
    brain = recipe.ASR(hparams, run_opts)
    brain.on_evaluate_start()
    brain.modules.eval()
    return brain


def check_options(arguments, joint):
    """UserError for what does not go with the run's kind of model, or is not there."""
    for name in CTC_OPTIONS if joint else ["ctc_weight_decode"]:
        if getattr(arguments, name) is not None:
            raise UserError(f"--{name} has no meaning for {'an S2S' if joint else 'a CTC'} run")
    for value in arguments.token_prune_min_logp or []:
        if value >= 0:
            raise UserError(
                f"--token_prune_min_logp {value:g} is the logarithm of a probability, so below 0; "
                "try -4,-8"
            )
    if arguments.lm and joint != Path(arguments.lm).is_dir():
        wanted = "the output folder of train_LM.py" if joint else "a word n-gram, .arpa or .bin"
        raise UserError(f"--lm {arguments.lm}: this run searches with {wanted}")
    for weight in arguments.ctc_weight_decode or []:
        if not 0 <= weight < 1:
            raise UserError(f"--ctc_weight_decode {weight} is not in [0, 1)")
    if arguments.encoded and arguments.save:
        raise UserError("--save and --encoded: give one of them")
    if arguments.save:
        check_save(Path(arguments.save))
    elif arguments.lm is None:
        raise UserError("give --lm, the language model to search with, or --save")


def check_save(path):
    """UserError unless the file can be written, before hours of work."""
    if path.is_dir():
        raise UserError(f"--save {path} is a folder; give the name of a file")
    if not path.absolute().parent.is_dir():
        raise UserError(f"--save {path}: there is no such folder; make it first")
    check_writable("save", path.parent)


def split_names(splits, hparams):
    """The splits to search on; UserError for a test set.

    And for one that was asked for and is not there, or is what the run learnt from.
    """
    asked = splits is not None
    names = [x.strip() for x in splits.split(",")] if asked else hparams.dev_splits
    for name in names:
        manifest = Path(hparams.output_folder, f"{name}.csv")
        if asked and (name == "train" or name in hparams.train_splits):
            raise UserError(
                f"--splits {name} is what the run learnt from, which it knows too well to choose "
                f"weights on; use {', '.join(hparams.dev_splits)}"
            )
        test = name in hparams.test_splits and name not in hparams.dev_splits
        if test or name.startswith("test"):
            raise UserError(
                f"--splits {name} is a test set: weights chosen on it make its error rate mean "
                f"nothing; use {', '.join(hparams.dev_splits)}"
            )
        if asked and not (name and manifest.is_file()):
            raise UserError(
                f"--splits {splits}: the run has no {manifest}; use a split that it was trained "
                f"with, {', '.join(hparams.dev_splits)}"
            )
    return names


def report(rows, arguments, joint):
    """Print the table, the winner by word error rate, and the options that it takes."""
    names = ["lm_weight", *(["ctc_weight_decode"] if joint else CTC_OPTIONS)]
    best = min((r for r in rows if "lm_weight" in r[0]), key=lambda r: r[1:])
    print("".join(f"{n:>22}" for n in names) + f"{'WER %':>10}{'CER %':>10}")
    for row in rows:
        cells = [f"{row[0][n]:g}" if n in row[0] else "-" for n in names]
        mark = "  <" if row is best else ""
        print("".join(f"{c:>22}" for c in cells) + f"{row[1]:>10.2f}{row[2]:>10.2f}{mark}")
    key = "pretrained_lm_tokenizer_path" if joint else "kenlm_model_path"
    options = {"no_lm": False, key: arguments.lm, **best[0]}
    if arguments.beam:
        options["test_beam_size"] = arguments.beam
    print("\n" + " ".join(f"--{k} {v}" for k, v in options.items()))
    if any(row[1:] <= best[1:] for row in rows if "lm_weight" not in row[0]):
        print("the language model does not help here: without it the error rate is no higher")


if __name__ == "__main__":
    main()
