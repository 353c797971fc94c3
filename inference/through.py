"""A recording of any length in one streamed pass: the text of one piece, in bounded memory.

The search would hold every frame. So it goes piece by piece, from one pause to the next: frames in
which it reads nothing but blank or space. What follows them changes nothing before, so the best
text of the whole is that of the pieces; a beam that goes through the whole may forget it.
"""

import torch

from inference.align import BLANK, pieces, timed_words, token_spans
from inference.streaming_ctc import StreamingCTC
from inference.words import GAP, spread
from modules.search import ctc_greedy
from modules.search.ctc import forbid

BLOCK = 2.0  # s that are encoded at once, at least
PAUSE = 0.2  # s of nothing but blank or space that end a piece
SHORTEST, LONGEST = 2.0, 30.0  # s of a piece; a longest one ends where it is most silent


class Through:
    """A causal or chunked CTC model hears a recording: `push` blocks, then `finish`.

    settled : words that stay as they are, whatever comes
    seconds : of audio, so far
    """

    def __init__(self, recognizer):
        self.recognizer, self.ctc = recognizer, StreamingCTC(recognizer)
        self.hop = recognizer.seconds_per_frame
        written = pieces(range(len(recognizer.tokenizer)), recognizer.tokenizer)
        self.gaps = {i for i, piece in enumerate(written) if piece.startswith(GAP)}
        self.silent = [BLANK, *(i for i, piece in enumerate(written) if piece == GAP)]
        self.waiting, self.samples = [], 0
        self.held, self.frame = torch.zeros(0, len(written)), 0  # not searched; where it begins
        self.open = []  # (token, span) of the last word, which may go on
        self.settled = []

    @property
    def seconds(self):
        return self.samples / self.recognizer.sample_rate

    def push(self, samples):
        """The next samples, (N,) float32 at the model's rate."""
        self.waiting.append(samples)
        self.samples += len(samples)
        if sum(map(len, self.waiting)) >= BLOCK * self.recognizer.sample_rate:
            self._encode()

    def finish(self):
        """The recording ends here -> its words."""
        self._encode(final=True)
        self._search(len(self.held))
        self._settle(len(self.open))
        return self.settled

    def maybe(self):
        """The words since the settled ones, as they are heard now: a greedy search."""
        (tokens,) = ctc_greedy(self.held[None], torch.tensor([len(self.held)]))
        return self._words([*self.open, *self._placed(tokens, self.held)])

    def _encode(self, final=False):
        x = torch.cat(self.waiting) if self.waiting else torch.zeros(0)
        self.waiting = []
        self.held = torch.cat([self.held, self.ctc.advance(x, final)])
        while n := self._pause():
            self._search(n)

    def _pause(self):
        """The frames up to the first pause, or 0."""
        shortest, width = round(SHORTEST / self.hop), max(1, round(PAUSE / self.hop))
        if len(self.held) < max(shortest, width):
            return 0
        least = self.recognizer.search.pruning["token_prune_min_logp"]
        silence = self.held[:, self.silent].amax(dim=1)
        others = forbid(self.held, {*self.silent, 1, 2}).amax(dim=1)
        quiet = (others <= least) & (others < silence)
        runs = quiet.unfold(0, width, 1).all(dim=1)[max(0, shortest - width) :].nonzero()
        if len(runs):
            return max(shortest, width) + int(runs[0])
        if len(self.held) < LONGEST / self.hop:
            return 0
        half = len(silence) // 2
        return half + int(silence[half:].argmax()) + 1

    def _search(self, frames):
        """Search the first frames held."""
        if not frames:
            return
        log_probs, self.held = self.held[:frames], self.held[frames:].clone()
        (tokens,) = self.recognizer.ctc_tokens(log_probs[None], torch.tensor([frames]))
        self.open += self._placed(tokens, log_probs)
        self.frame += frames
        ends = [i for i, (token, _) in enumerate(self.open) if token in self.gaps]
        whole = self.recognizer.search.searcher is not None  # an n-gram's text knows no open word
        self._settle(len(self.open) if whole else max(ends, default=0))

    def _placed(self, tokens, log_probs):
        """Tokens of frames that begin where `held` does -> [(token, span)]."""
        spans = token_spans(tokens, log_probs)
        if spans is None:
            spans = spread(tokens, len(log_probs))
        moved = ((a + self.frame, b + self.frame, p) for a, b, p in spans)
        return list(zip(tokens, moved, strict=True))

    def _settle(self, count):
        """The first of the open tokens are whole words."""
        self.settled += self._words(self.open[:count])
        self.open = self.open[count:]

    def _words(self, placed):
        tokens, spans = [token for token, _ in placed], [span for _, span in placed]
        return timed_words(tokens, spans, self.hop, self.seconds, self.recognizer.tokenizer)
