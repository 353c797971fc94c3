"""CTC posteriors as they come -> words so far, and segments that end in a pause."""

from dataclasses import dataclass, replace

from inference.align import BLANK, GAP, pieces, timed_words, words_of
from inference.transcript import Final
from modules.errors import UserError
from modules.search.ctc import forbid

LONGEST = 30.0  # s of a segment that no pause ends: then it ends before its last word


@dataclass(frozen=True)
class Token:
    """A token of the best path: the frames that it takes, and its highest posterior there."""

    id: int
    start: int
    end: int
    posterior: float


class Segmenter:
    """Greedy CTC search that carries its last frame's token, and cuts at pauses.

    Arguments
    ---------
    tokenizer : CharacterTokenizer or SubwordTokenizer
    seconds_per_frame : float
    endpoint_seconds : float or None
        Without a token for so long, and with at least one word before, a segment is final; a
        space is no token here. None: no pause ends a segment.
    history : bool
        Keep the tokens of final segments for `words`.
    """

    def __init__(self, tokenizer, seconds_per_frame, endpoint_seconds, history):
        if endpoint_seconds is not None and not 0 < endpoint_seconds < float("inf"):
            raise UserError(
                f"endpoint_seconds={endpoint_seconds} is no pause; give 0.8, for instance"
            )
        self.tokenizer, self.seconds_per_frame = tokenizer, seconds_per_frame
        self.pause = float("inf")
        if endpoint_seconds is not None:
            self.pause = max(1, round(endpoint_seconds / seconds_per_frame))
        self.longest = round(LONGEST / seconds_per_frame)
        self.history = [] if history else None
        written = pieces(range(len(tokenizer)), tokenizer)
        self.silent = {BLANK, *(i for i, p in enumerate(written) if not p.removeprefix(GAP))}
        self.reset()

    def reset(self):
        """Forget everything: a new utterance begins."""
        self.frame, self.last = 0, BLANK
        self.spoken = 0  # frames up to the last one that is not silent
        self.tokens = []  # of the segment that is not final yet
        if self.history:
            self.history = []

    def hear(self, log_probs):
        """log_probs (T, V), the next frames -> the segments that end in them."""
        best, ids = forbid(log_probs, (1, 2)).max(dim=-1)
        finals = []
        for token, posterior in zip(ids.tolist(), best.exp().tolist(), strict=True):
            if token != BLANK:
                self._add(token, min(posterior, 1.0))
            self.last = token
            self.frame += 1
            if token not in self.silent:
                self.spoken = self.frame
            finals += self._cut()
        return finals

    def _add(self, token, posterior):
        if token != self.last:
            self.tokens.append(Token(token, self.frame, self.frame + 1, posterior))
        elif self.tokens:
            t = self.tokens[-1]
            highest = max(t.posterior, posterior)
            self.tokens[-1] = replace(t, end=self.frame + 1, posterior=highest)

    def _cut(self):
        """End the segment if its time has come: a list of one segment, or of none."""
        if not self.tokens:
            return []
        kept = len(self.tokens)
        if self.frame - self.tokens[0].start >= self.longest:
            words = words_of([t.id for t in self.tokens], self.tokenizer)
            if len(words) > 1:
                kept = words[-1][1][0]
        elif self.frame - self.spoken < self.pause:
            return []
        ended, self.tokens = self.tokens[:kept], self.tokens[kept:]
        if self.history is not None:
            self.history += ended
        words = tuple(self._words(ended))
        if not words:
            return []
        text = " ".join(w.text for w in words)
        return [Final(text, words[0].start, words[-1].end, words)]

    def partial(self):
        """The words since the last final segment."""
        return self._words(self.tokens)

    def words(self, duration):
        """The words of `duration` seconds; without history, those since the last final segment."""
        return self._words([*(self.history or []), *self.tokens], duration)

    def _words(self, tokens, duration=float("inf")):
        spans = [(t.start, t.end, t.posterior) for t in tokens]
        ids = [t.id for t in tokens]
        return timed_words(ids, spans, self.seconds_per_frame, duration, self.tokenizer)
