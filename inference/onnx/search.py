"""CTC in numpy, one utterance at a time: prefix beam search, and the frames of its tokens."""

import math
from itertools import pairwise

import numpy as np

BLANK = 0
FORBIDDEN = (1, 2)  # bos and eos
MINUS_INF = float("-inf")


def ctc_beam(log_probs, beam_size, beam_prune_logp, token_prune_min_logp):
    """log_probs (T, V) -> the ids of the best prefix; arguments of `modules.search.CTCSearch`."""
    log_probs = np.array(log_probs, dtype=np.float64)
    log_probs[:, list(FORBIDDEN)] = MINUS_INF
    beams = {(): (0.0, MINUS_INF)}  # prefix -> log-probability of ending in blank, of not
    best = log_probs.argmax(axis=1)
    for frame, top in zip(log_probs, best, strict=True):
        kept = {int(top), *np.flatnonzero(frame > token_prune_min_logp).tolist()}
        grown = read(beams, [(token, float(frame[token])) for token in kept])
        ranked = sorted(((add(*ends), prefix) for prefix, ends in grown.items()), reverse=True)
        least = ranked[0][0] + beam_prune_logp
        beams = {p: grown[p] for score, p in ranked[:beam_size] if score >= least}
    return list(max(beams, key=lambda prefix: add(*beams[prefix])))


def read(beams, frame):
    """One frame's (token, log-probability) pairs: beams -> all beams that they lead to."""
    grown = {}

    def put(prefix, blank, other):
        b, n = grown.get(prefix, (MINUS_INF, MINUS_INF))
        grown[prefix] = add(b, blank), add(n, other)

    for prefix, (blank, other) in beams.items():
        total = add(blank, other)
        for token, p in frame:
            if token == BLANK:
                put(prefix, total + p, MINUS_INF)
            elif prefix and token == prefix[-1]:
                put(prefix, MINUS_INF, other + p)
                put((*prefix, token), MINUS_INF, blank + p)
            else:
                put((*prefix, token), MINUS_INF, total + p)
    return grown


def add(a, b):
    """log(exp(a) + exp(b))"""
    if a < b:
        a, b = b, a
    return a if b == MINUS_INF else a + math.log1p(math.exp(b - a))


def token_spans(tokens, log_probs):
    """Tokens -> [(first frame, frame after the last, highest posterior)]; None without room.

    By the best path (Viterbi) of log_probs (T, V) that reads as the tokens.
    """
    if not tokens:
        return []
    if len(tokens) + sum(a == b for a, b in pairwise(tokens)) > len(log_probs):
        return None
    labels = np.full(2 * len(tokens) + 1, BLANK)
    labels[1::2] = tokens
    jumps = np.zeros(len(labels), dtype=bool)  # over a blank, between tokens that differ
    jumps[3::2] = labels[3::2] != labels[1:-2:2]
    emitted = log_probs[:, labels]
    score = np.full(len(labels), MINUS_INF)
    score[:2] = emitted[0, :2]
    moves = np.zeros(emitted.shape, dtype=np.int8)
    for t in range(1, len(emitted)):
        one, two = np.full((2, len(labels)), MINUS_INF)
        one[1:] = score[:-1]
        two[2:] = np.where(jumps[2:], score[:-2], MINUS_INF)
        options = np.stack([score, one, two])
        moves[t] = options.argmax(axis=0)
        score = options.max(axis=0) + emitted[t]
    place = len(labels) - 1 - int(score[-2] > score[-1])
    spans = {}
    for t in reversed(range(len(emitted))):
        if place % 2:
            _, end, posterior = spans.get(place // 2, (t, t + 1, 0.0))
            now = min(float(np.exp(emitted[t, place])), 1.0)
            spans[place // 2] = (t, end, max(posterior, now))
        place -= int(moves[t, place])  # its int8 holds no place
    return [spans[i] for i in range(len(tokens))]
