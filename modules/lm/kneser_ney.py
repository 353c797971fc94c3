"""Interpolated modified Kneser-Ney n-grams (Chen & Goodman 1998), with the numbers of lmplz.

Heafield et al. 2013 (Scalable modified Kneser-Ney, section 3) has the formulas. Everything lies in
memory: good for some millions of words; KenLM's lmplz takes billions.
"""

from collections import Counter, defaultdict

BOS, EOS, UNKNOWN = "<s>", "</s>", "<unk>"
FALLBACK = (0.0, 0.5, 1.0, 1.5)  # lmplz's, where a text is too small to measure discounts


def estimate(sentences, order):
    """Sentences of words -> [{n-gram: (probability, backoff)} of 1, 2, ... order words]."""
    tables, lower, size = [], {}, 0
    for n, counts in enumerate(adjusted_counts(sentences, order), start=1):
        discounts = measure_discounts(counts)
        totals = defaultdict(lambda: [0, 0, 0, 0])  # of a context: sum; words seen 1, 2, 3+ times
        for ngram, count in counts.items():
            total = totals[ngram[:-1]]
            total[0] += count
            total[min(count, 3)] += 1
        left = {
            c: sum(d * t for d, t in zip(discounts[1:], times, strict=True)) / total
            for c, (total, *times) in totals.items()
        }
        if n == 1:
            size = len(counts) + 1  # with the unknown word
            probabilities = {(UNKNOWN,): left[()] / size}
        else:
            tables.append({g: (p, left.get(g, 1.0)) for g, p in lower.items()})
            probabilities = {}
        for ngram, count in counts.items():
            context = ngram[:-1]
            seen = (count - discounts[min(count, 3)]) / totals[context][0]
            rest = lower[ngram[1:]] if n > 1 else 1 / size
            probabilities[ngram] = seen + left[context] * rest
        if n == 1:
            probabilities[(BOS,)] = 1e-99  # never predicted; its backoff counts
        lower = probabilities
    return [*tables, {g: (p, 1.0) for g, p in lower.items()}]


def adjusted_counts(sentences, order):
    """[{n-gram: count} of 1, 2, ... words]: how often, or of shorter ones after how many words.

    What begins a sentence has no word before it and keeps its number.
    """
    counts = [Counter() for _ in range(order)]
    for sentence in sentences:
        words = (BOS, *sentence.split(), EOS)
        counts[-1].update(zip(*(words[i:] for i in range(order)), strict=False))
        for n in range(2, min(order, len(words) + 1)):
            counts[n - 1][words[:n]] += 1
    for longer, shorter in zip(counts[:0:-1], counts[-2::-1], strict=True):
        shorter.update(ngram[1:] for ngram in longer)
    return counts


def measure_discounts(counts):
    """(0, D1, D2, D3+): what n-grams seen 1, 2, 3 and more times give to unseen ones."""
    times = Counter(counts.values())
    if not all(times[k] for k in (1, 2, 3, 4)):
        return FALLBACK
    y = times[1] / (times[1] + 2 * times[2])
    discounts = (0.0, *(k - (k + 1) * y * times[k + 1] / times[k] for k in (1, 2, 3)))
    measured = all(0 < discounts[k] <= k for k in (1, 2, 3))
    return discounts if measured else FALLBACK
