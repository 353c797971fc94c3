"""A language model in the search: it reads every hypothesis anew at each token."""

import torch


class PrefixLanguageModel:
    """weight x log-probabilities of next tokens, of logits divided by the temperature.

    lm: SpeechBrain's `TransformerLM`, tokens (B, U) -> logits (B, U, V). It keeps no state, so
    work grows with the prefix.
    """

    def __init__(self, lm, weight, temperature):
        self.lm, self.weight, self.temperature = lm, weight, temperature
        self.prefixes = None

    def score(self, tokens):
        """The last tokens of all prefixes (B x beam,) -> (B x beam, V)."""
        tokens = tokens.unsqueeze(1)
        before = tokens[:, :0] if self.prefixes is None else self.prefixes
        self.prefixes = torch.cat([before, tokens], dim=1)
        logits = self.lm(self.prefixes)[:, -1]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return self.weight * (logits / self.temperature).log_softmax(-1)

    def reorder(self, predecessors):
        self.prefixes = self.prefixes.index_select(0, predecessors)
