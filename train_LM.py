#!/usr/bin/env python3
"""Train a language model over subword units, and their tokenizer, from text.

python train_LM.py hparams/LM/mamba.yaml --train_text "[train.txt]" --dev_text "[dev.txt]"
"""

import json
import shutil
import time
from itertools import islice
from pathlib import Path

import speechbrain as sb
from speechbrain.utils.distributed import if_main_process

from modules import launch
from modules.errors import UserError
from modules.language_model import CLASSES, DESCRIPTION, find_tokenizer
from modules.lm.brain import LMBrain
from modules.lm.data import eval_loader_options, load_sentences, train_loader_options
from modules.lm.text import files_of, read_sentences
from modules.recipe import heading, locked, save_hyperparams, write_summary
from modules.resolved import ResolvedYAML
from modules.whole import whole

HELP = """Train a language model and its tokenizer.

usage: python {script} HPARAMS.yaml --train_text "[FILE, ...]" --dev_text "[FILE, ...]"
       torchrun --nproc-per-node N {script} HPARAMS.yaml ...

Texts: files with a sentence a line or with transcripts (<id> WORDS), plain or gzipped, folders in
LibriSpeech layout, and manifests of speech (.csv, .jsonl). Any top-level key of the YAML file can
be given on the command line:

  python {script} {example} --train_text "[/data/LibriSpeech/train-clean-100]" \\
      --dev_text "[/data/LibriSpeech/dev-clean]" --token_type bpe --output_neurons 1000
  python {script} {example} ... --tokenizer_path results/S2S/conmamba_small/3402  # its units
  python {script} HPARAMS.yaml --help            # the keys of one file, with their defaults

Running the same command again continues a run that was interrupted. Then, with the folder:

  python train_S2S.py HPARAMS.yaml --pretrained_lm_tokenizer_path OUTPUT_FOLDER --no_lm False
  python transcribe.py FILE --model DIR --lm OUTPUT_FOLDER

Word n-grams for CTC: python -m modules.lm.ngram --help

HPARAMS.yaml is one of these, or a copy that you changed:

  {available}
"""

ENOUGH = 1_000_000  # sentences to learn units from, which SentencePiece keeps in memory


def prepare_tokenizer(hparams):
    """Load the output folder's tokenizer: of `tokenizer_path`, or trained from the text."""
    tokenizer = hparams["tokenizer"]
    path = Path(hparams["output_folder"]) / "tokenizer.ckpt"

    def take_or_train():
        if path.is_file():
            return
        source = hparams["tokenizer_path"] or hparams["resume"]
        if source is None:
            text = read_sentences(hparams["train_text"], "train_text")
            tokenizer.train(list(islice(text, ENOUGH)), path)
            return
        with whole(path) as beside:
            shutil.copyfile(find_tokenizer(source), beside)

    launch.on_main(take_or_train)
    tokenizer.load(path)


def check_texts(hparams):
    """UserError for texts that are not there, before any work."""
    for key in ("train_text", "dev_text", "test_text"):
        if not hparams[key] and key != "test_text":
            raise UserError(f'{key} is empty; give texts, such as --{key} "[{key}.txt]"')
        for path in hparams[key]:
            files_of(Path(str(path)), key)


def run(path, hparams, run_opts, overrides):
    started = time.monotonic()
    folder = Path(hparams["output_folder"])
    check_texts(hparams)
    sb.create_experiment_directory(folder)
    prepare_tokenizer(hparams)
    train, dev = load_sentences(hparams, "train_text"), load_sentences(hparams, "dev_text")
    texts = {"dev": dev}
    if hparams["test_text"]:
        texts["test"] = load_sentences(hparams, "test_text")
    brain = LMBrain(hparams, run_opts)
    brain.clock.since = started
    brain.check_start()
    launch.on_main(save_hyperparams, path, hparams, overrides)
    if not hparams["skip_train"]:
        brain.fit(
            hparams["epoch_counter"],
            train,
            dev,
            train_loader_kwargs=train_loader_options(hparams, train),
            valid_loader_kwargs=eval_loader_options(hparams, dev),
        )
    brain.test(texts)
    brain.write_weights(folder / "lm.ckpt")
    if if_main_process():
        describe(folder)
        write_summary(hparams, brain, summary(path, hparams, brain, train), started)


def describe(folder):
    """Write how the model is built, as plain data: recognisers read it without the YAML file."""
    where = "modules/language_model.py"
    model = ResolvedYAML(folder / "hyperparams.yaml", CLASSES, where).value("lm")
    with whole(folder / DESCRIPTION) as beside:
        beside.write_text(json.dumps(model, indent=2) + "\n", encoding="utf-8")


def summary(path, hparams, brain, train):
    """One screen: model, text, perplexities, files."""
    amount = f"{len(train)} sentences, {train.words} words, {len(train.tokens)} tokens"
    lines = [
        *heading(path, hparams, brain, amount),
        f"left out     {train.too_long} sentences of more than {hparams['max_tokens']} tokens",
        "",
        f"{'text':<20}{'words':>10}{'PPL token':>12}{'PPL word':>12}",
    ]
    for name, r in brain.results.items():
        lines.append(f"{name:<20}{r['words']:>10}{r['PPL']:>12.2f}{r['PPL word']:>12.1f}")
        if r["too long"]:
            lines.append(f"  without {r['too long']} sentences of more than max_tokens")
    lines += [
        "",
        f"for searches {hparams['output_folder']}: lm.ckpt, {DESCRIPTION}, tokenizer.ckpt",
    ]
    lines += [f"log          {hparams['train_log']}", ""]
    return "\n".join(lines)


def main(argv):
    locked(argv, "train_LM.py", run)


if __name__ == "__main__":
    launch.run(main, "train_LM.py", "hparams/LM/mamba.yaml", HELP)
