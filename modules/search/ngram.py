"""A word n-gram in SpeechBrain's CTC beam search, read in Python where KenLM is not installed."""

import math

from modules.lm.arpa import Arpa
from modules.lm.kneser_ney import BOS, EOS

LONG = 6  # letters: longer unknown beginnings cost more


class WordScorer:
    """SpeechBrain's `KenlmScorer` without KenLM: the same methods, the same numbers.

    Arguments
    ---------
    path : str
        An .arpa file.
    alpha, beta : float
        Weight of the n-gram and bonus a word.
    unk_score_offset : float
        Added to the log10 probability of an unknown word, and to the natural one of its beginning.
    """

    def __init__(self, path, alpha, beta, unk_score_offset=-10.0):
        self.arpa, self.alpha, self.beta = Arpa(path), alpha, beta
        self.unk_score_offset = unk_score_offset
        self.beginnings = {word[:n] for word in self.arpa.words for n in range(1, len(word) + 1)}

    @property
    def order(self):
        return self.arpa.order

    def get_start_state(self):
        return (BOS,)

    def score(self, prev_state, word, is_last_word=False):
        """Words before and the next -> what it adds to a hypothesis, the words that matter now."""
        score, state = self.arpa.score(prev_state, word)
        if word not in self.arpa.words:
            score += self.unk_score_offset
        if is_last_word:
            score += self.arpa.score(state, EOS)[0]
        return self.alpha * score * math.log(10) + self.beta, state

    def score_partial_token(self, partial_token):
        """What an unfinished word adds: nothing where a known one begins so."""
        if partial_token in self.beginnings:
            return 0.0
        return self.unk_score_offset * max(1.0, len(partial_token) / LONG)
