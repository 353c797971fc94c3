"""A language model in the search: over the whole hypothesis, or with the state that it carries."""

import torch

from modules.decoder import select_hypotheses


def start_language_model(lm, weight, temperature, hypotheses):
    """The scorer of a search with so many hypotheses.

    lm: tokens (B, U) -> logits (B, U, V), such as SpeechBrain's `TransformerLM`; one with `start`
    and `advance`, such as `modules.lm.mamba_lm.MambaLM`, reads every token once.
    """
    if hasattr(lm, "advance"):
        return CarriedLanguageModel(lm, weight, temperature, hypotheses)
    return PrefixLanguageModel(lm, weight, temperature)


def weighted(logits, weight, temperature):
    """weight x log-probabilities of logits divided by the temperature, in float32 or more."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return weight * (logits / temperature).log_softmax(-1)


class PrefixLanguageModel:
    """Reads every hypothesis anew at each token: work grows with the prefix."""

    def __init__(self, lm, weight, temperature):
        self.lm, self.weight, self.temperature = lm, weight, temperature
        self.prefixes = None

    def score(self, tokens):
        """The last tokens of all prefixes (B x beam,) -> (B x beam, V)."""
        tokens = tokens.unsqueeze(1)
        before = tokens[:, :0] if self.prefixes is None else self.prefixes
        self.prefixes = torch.cat([before, tokens], dim=1)
        return weighted(self.lm(self.prefixes)[:, -1], self.weight, self.temperature)

    def reorder(self, predecessors):
        self.prefixes = self.prefixes.index_select(0, predecessors)


class CarriedLanguageModel:
    """Carries a state of constant size, reordered with the hypotheses: constant work a token."""

    def __init__(self, lm, weight, temperature, hypotheses):
        self.lm, self.weight, self.temperature = lm, weight, temperature
        self.state = lm.start(hypotheses)

    def score(self, tokens):
        """The last tokens of all prefixes (B x beam,) -> (B x beam, V)."""
        logits, self.state = self.lm.advance(tokens.unsqueeze(1), self.state)
        return weighted(logits[:, 0], self.weight, self.temperature)

    def reorder(self, predecessors):
        self.state = select_hypotheses(self.state, predecessors)
