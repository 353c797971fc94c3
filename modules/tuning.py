"""Weights of a search, tried on a development set that is encoded once."""

import hashlib
import itertools
import sys
from pathlib import Path

import speechbrain as sb
import torch
from speechbrain.utils.metric_stats import ErrorRateStats
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from modules.data import load_manifest
from modules.errors import UserError
from modules.language_model import check_units, load_language_model
from modules.search import CTCSearch
from modules.tensors import load_tensors, save_tensors
from modules.waveforms import Batch, Unread, read_audio

# ---- Encoding, once ----


def encoded(brain, run, names, utterances=None):
    """{"x": [log-probabilities or memory (T, ...)], "texts": [...], ...} on the CPU.

    names: of splits whose manifests the run has; utterances: so many of them, None: all.
    """
    hparams, rows = brain.hparams, []
    for name in names:
        dataset = load_manifest(Path(run) / f"{name}.csv", vars(hparams))
        rows += dataset.data.values()
    rows = spread(rows, utterances)
    rows.sort(key=lambda row: float(row["duration"]))
    found = {"x": [], "texts": [], "joint": hasattr(hparams, "decoder"), "head": head(brain)}
    size = hparams.test_batch_size
    for start in progress(range(0, len(rows), size), "encoding"):
        encode(rows[start : start + size], brain, found)
    if not found["x"]:
        raise UserError(
            f"no recording of {', '.join(names)} can be read where the manifests in {run} say; "
            "bring the audio back there"
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


def save(found, path):
    """Write what was encoded, whole or not at all."""
    save_tensors(found, path)


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


def tune_ctc(brain, lm, weights, bonuses, prunes, beam=None):
    """Yield ({option: value}, search): first without a language model, then each combination.

    beam: None: the run's.
    """
    hparams = brain.hparams
    settings = {
        "beam_size": beam or hparams.test_beam_size,
        "beam_prune_logp": hparams.beam_prune_logp,
        "token_prune_min_logp": hparams.token_prune_min_logp,
    }
    yield {}, CTCSearch(brain.tokenizer.labels, **settings)
    search = CTCSearch(brain.tokenizer.labels, kenlm_model_path=lm, **settings)
    for prune, weight, bonus in itertools.product(prunes, weights, bonuses):
        search.prune(prune)
        search.weigh(weight, bonus)
        options = {"lm_weight": weight, "word_bonus": bonus, "token_prune_min_logp": prune}
        yield options, search


def tune_s2s(brain, folder, weights, ctc_weights=None, beam=None):
    """As `tune_ctc`, with the language model in a folder."""
    hparams = brain.hparams
    check_units(folder / "tokenizer.ckpt", Path(hparams.save_folder) / "tokenizer.model")
    lm = load_language_model(hparams.make_lm, folder).to(brain.device)
    search = hparams.test_search
    search.beam_size = beam or search.beam_size

    def run(memory, lengths):
        ids, _ = search(memory.to(brain.device), lengths.to(brain.device))
        return [brain.tokenizer.decode(i) for i in ids]

    for ctc_weight in ctc_weights or [search.ctc_weight]:
        search.ctc_weight, search.language_model = ctc_weight, None
        yield {"ctc_weight_decode": ctc_weight}, run
        for weight in weights:
            search.use_language_model(lm, weight, hparams.temperature_lm)
            yield {"lm_weight": weight, "ctc_weight_decode": ctc_weight}, run


def measured(tuned, found, brain):
    """Yield (options, WER, CER) for each combination."""
    size = brain.hparams.test_batch_size
    for options, search in tuned:
        wer, cer = ErrorRateStats(), ErrorRateStats(split_tokens=True)
        name = " ".join(f"{k} {v:g}" for k, v in options.items()) or "without"
        for start in progress(range(0, len(found["x"]), size), name):
            xs = found["x"][start : start + size]
            lengths = torch.tensor([len(x) for x in xs])
            heard = search(pad_sequence(xs, batch_first=True), lengths)
            said = found["texts"][start : start + size]
            ids = range(start, start + len(xs))
            for metric in (wer, cer):
                metric.append(ids, [t.split() for t in heard], [t.split() for t in said])
        yield options, wer.summarize("error_rate"), cer.summarize("error_rate")


def progress(steps, name):
    return tqdm(steps, desc=name, disable=None, leave=False, file=sys.stderr)
