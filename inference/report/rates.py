"""Error rates with intervals: bootstrap over utterances and, where there are several, over runs."""

from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
SEED = 20240712
LEVEL = 95  # percent
BLOCK = 2**22  # drawn numbers at once: 32 MB


@dataclass(frozen=True)
class Estimate:
    """A rate in percent and its 95 % interval; of each run too."""

    value: float
    low: float
    high: float
    runs: tuple = ()

    def __str__(self):
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def word_counts(utterances):
    """Word errors and words of each utterance: (N, 2)."""
    return np.array([(u.errors, len(u.reference)) for u in utterances], dtype=np.int64)


def character_counts(utterances):
    """Character errors and characters of each utterance: (N, 2).

    Words count with the space between them, as in the CER that the recipes print.
    """
    texts = [(" ".join(u.reference), " ".join(u.hypothesis)) for u in utterances]
    return np.array(list(zip(distances(texts), [len(a) for a, _ in texts], strict=True)))


def distances(pairs):
    """Levenshtein distances of pairs of texts, in batches of similar length."""
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][1]))
    found = [0] * len(pairs)
    for start in range(0, len(order), 256):
        part = order[start : start + 256]
        for i, distance in zip(part, batch_distances([pairs[i] for i in part]), strict=True):
            found[i] = int(distance)
    return found


def batch_distances(pairs):
    """One row of the table a step, for all pairs at once."""
    said, heard = padded([a for a, _ in pairs]), padded([b for _, b in pairs])
    a_length, b_length = (np.array([len(p[i]) for p in pairs]) for i in (0, 1))
    steps = np.arange(heard.shape[1] + 1)
    row = np.tile(steps, (len(pairs), 1))
    done = row[np.arange(len(pairs)), b_length]
    for i in range(said.shape[1]):
        best = np.empty_like(row)
        best[:, 0] = i + 1
        best[:, 1:] = np.minimum(row[:, 1:] + 1, row[:, :-1] + (heard != said[:, i : i + 1]))
        # An insertion costs one a step to the right: a running minimum, once that is taken off.
        row = np.minimum.accumulate(best - steps, axis=1) + steps
        last = a_length == i + 1
        done[last] = row[last, b_length[last]]
    return done


def padded(texts):
    """Texts as code points (B, longest), 0 behind their ends."""
    out = np.zeros((len(texts), max(map(len, texts), default=0)), dtype=np.int64)
    for row, text in zip(out, texts, strict=True):
        row[: len(text)] = [ord(c) for c in text]
    return out


def estimate(runs):
    """The mean rate of runs on the same utterances, each (N, 2) errors and units -> Estimate."""
    rates = resampled(runs, np.random.default_rng(SEED))
    return Estimate(point(runs), *interval(rates), tuple(point([run]) for run in runs))


def difference(ours, theirs):
    """`estimate` of ours less theirs: every resample has the same utterances on both sides."""
    rates = resampled(ours, np.random.default_rng(SEED), theirs)
    return Estimate(point(ours) - point(theirs), *interval(rates))


def point(runs):
    """The mean over runs of errors by units, percent."""
    return float(np.mean([100 * run[:, 0].sum() / max(run[:, 1].sum(), 1) for run in runs]))


def interval(rates):
    margin = (100 - LEVEL) / 2
    low, high = np.percentile(rates, [margin, 100 - margin])
    return float(low), float(high)


def resampled(runs, random, others=()):
    """Rates of resamples (RESAMPLES,); with others, less their rates of the same utterances.

    Utterances are drawn with replacement; so are, when there are several, the runs of each side,
    for another training gives another rate.
    """
    sides = [np.stack(side).astype(float) for side in (runs, others) if len(side)]
    count = sides[0].shape[1]
    out = []
    step = max(1, BLOCK // max(count, 1))
    for start in range(0, RESAMPLES, step):
        size = min(step, RESAMPLES - start)
        drawn = random.integers(count, size=(size, count))
        rates = [side_rates(side, drawn, random) for side in sides]
        out.append(rates[0] - rates[1] if len(sides) > 1 else rates[0])
    return np.concatenate(out)


def side_rates(side, drawn, random):
    """(runs, N, 2) and drawn utterances (size, N) -> mean rates over drawn runs (size,)."""
    rates = np.stack(
        [100 * run[drawn, 0].sum(1) / np.maximum(run[drawn, 1].sum(1), 1) for run in side]
    )
    if len(side) == 1:
        return rates[0]
    chosen = random.integers(len(side), size=(len(side), drawn.shape[0]))
    return np.take_along_axis(rates, chosen, axis=0).mean(0)
