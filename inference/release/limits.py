"""What a model is not: the part of a model card that its training's manifest dictates."""

import csv
from pathlib import Path

from inference.report.rates import estimate, word_counts
from modules.errors import UserError

FEW = 60  # different words: such a model knows these alone, and the card lists them
TEXT = """## What it is not

**Not a general recogniser.** {learnt} from {amount} of speech by {speakers}. {words}

- {measured}
- Not measured: other words, accents, ages and microphones, noise, music, several people at once,
  spontaneous or far-field speech, other languages. Expect it to fail there, and to write words
  where there are none.
- Its confidences are not calibrated. Not for decisions about people, nor where a wrong word does
  harm.
- What it is for: a checkpoint to train on from, and to compare with (docs/releasing.md of the
  repository).

## This file

{weights} Packed and checked by `python -m inference.release`: unpacked in an empty folder and
loaded by a process without network, it transcribed {checked}
"""


def limits(run, weights, checked):
    """The card's text; UserError where the run's manifest is not there to tell.

    run : inference.report.folder.Run; weights, checked : sentences.
    """
    amount, speakers, vocabulary = training_data(run.path)
    went_on = bool(run.settings.get("resume"))
    return TEXT.format(
        learnt="In its last stage it has learnt" if went_on else "It has learnt",
        amount=amount,
        speakers=plural(speakers, "speaker"),
        words=vocabulary_text(vocabulary, went_on),
        measured="\n- ".join(measured(run)),
        weights=weights,
        checked=checked,
    )


def training_data(folder):
    """(amount as text, number of speakers, {word}) of train.csv."""
    path = Path(folder) / "train.csv"
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        seconds = sum(float(row["duration"]) for row in rows)
        speakers = {row["spk_id"].partition("-")[0] for row in rows}
        return duration(seconds), len(speakers), {w for row in rows for w in row["wrd"].split()}
    except OSError:
        raise UserError(
            f"{path} is missing: without it the card cannot say what the model learnt from; copy "
            "it from where the training ran"
        ) from None
    except (KeyError, ValueError) as error:
        raise UserError(f"{path} is no manifest of a training: {error}") from None


def duration(seconds):
    return f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{seconds / 60:.1f} minutes"


def plural(number, word):
    return f"{number:,} {word}" + ("" if number == 1 else "s")


def vocabulary_text(words, went_on):
    if len(words) > FEW or went_on:
        return f"That speech has {len(words):,} different words."
    return f"It has heard {len(words)} different words and no others: {', '.join(sorted(words))}."


def measured(run):
    """A sentence a test set: how much it holds, and the interval of its error rate."""
    for name, utterances in run.test_sets.items():
        speakers = len({u.speaker for u in utterances})
        words = sum(len(u.reference) for u in utterances)
        yield (
            f"{name}: WER {estimate([word_counts(utterances)])} (95 % interval by bootstrap over "
            f"utterances) on {words:,} words by {plural(speakers, 'speaker')}."
        )
