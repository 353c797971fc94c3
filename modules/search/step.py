"""One token of a joint search: decoder, CTC and language model scores, then the best of them."""

import torch

from modules.decoder import select_hypotheses
from modules.search.beams import LEAST, MINUS_INF


class TokenStep:
    """A search under way: every call extends all hypotheses by one token.

    A call neither waits for the device nor, while the decoder's state does not grow, makes a
    tensor of another shape than the call before: `modules.search.graph` relies on both.

    Arguments
    ---------
    search : modules.search.JointBeamSearch
        Decoder, heads and settings.
    beams : modules.search.beams.Beams
    state : the decoder's, of every hypothesis
    ctc : modules.search.prefix.CTCPrefixScorer or None
    language_model : what modules.search.language.start_language_model returns, or None
    fewest, most : (B x beam,) int
        Limits of the number of tokens, eos not counted.
    """

    def __init__(self, search, beams, state, ctc, language_model, fewest, most):
        self.search, self.beams, self.ctc, self.language_model = search, beams, ctc, language_model
        self.start = self.state = state
        self.fewest, self.most = fewest, most

    def __call__(self):
        state, predecessors = self.extend()
        self.state = reorder(state, self.start, predecessors)

    def extend(self):
        """-> the decoder's state after the step, and whom of it each hypothesis (B x beam,) is."""
        search, beams = self.search, self.beams
        x, state = search.decoder.advance(beams.tokens.unsqueeze(1), self.state)
        logits = search.head(x[:, 0])
        # The rest is float32 whatever the precision of the modules.
        with torch.autocast(x.device.type, enabled=False):
            log_probs = self._score(logits)
            predecessors = beams.extend(log_probs)
            if self.ctc is not None:
                self.ctc.advance(predecessors, beams.tokens)
            if self.language_model is not None:
                self.language_model.reorder(predecessors)
        return state, predecessors

    def _score(self, logits):
        """Decoder's logits (B x beam, V) -> weighted sum of all log-probabilities, same shape."""
        search = self.search
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        log_probs = (logits / search.temperature).log_softmax(-1) * (1 - search.ctc_weight)
        end = log_probs[:, search.eos_index].clone()
        for token in (search.blank_index, search.bos_index, search.eos_index):
            log_probs[:, token].fill_(MINUS_INF)
        step = self.beams.step
        log_probs.masked_fill_((step >= self.most).unsqueeze(1), MINUS_INF)
        may_end = (step >= self.fewest) & self._above_threshold(end, log_probs)

        log_probs[:, search.eos_index].copy_(end)
        if self.ctc is not None:
            log_probs += search.ctc_weight * self.ctc.score()
        if self.language_model is not None:
            log_probs += self.language_model.score(self.beams.tokens)

        # What can take no other token may always end: it is at its limit, or CTC has no frame left.
        column = log_probs[:, search.eos_index]
        end = column.clone()
        column.fill_(MINUS_INF)
        stuck = ~(log_probs > LEAST).any(1)
        column.copy_(end.masked_fill_(~(may_end | stuck), MINUS_INF))
        return log_probs

    def _above_threshold(self, end, others):
        """Whether eos, `end` (B x beam,), is likely enough beside the others (B x beam, V).

        The best always is, also at log-probability 0, which is not above eos_threshold x 0.
        """
        if not self.search.using_eos_threshold:
            return torch.ones_like(end, dtype=torch.bool)
        best = others.amax(1)
        return (end >= best) | (end > self.search.eos_threshold * torch.maximum(end, best))


def reorder(state, start, index):
    """`select_hypotheses`, leaving alone what no step has replaced since the `start` state.

    Such tensors (a Transformer's keys and values of the memory) depend on the utterance alone, so
    they are equal in all of its beams and `index` never leads out of an utterance.
    """
    if state is start:
        return state
    if isinstance(state, tuple | list):
        return type(state)(reorder(a, b, index) for a, b in zip(state, start, strict=True))
    return select_hypotheses(state, index)
