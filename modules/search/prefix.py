"""CTC prefix scores of all next tokens of all hypotheses at once, without a loop over frames.

Watanabe et al. 2017, Hybrid CTC/attention architecture, algorithm 2. Its recursions over frames are
linear in the probabilities: the score is a matrix product, the state a cumulative sum.
"""

import torch

from modules.lengths import valid_frames
from modules.ops import ctc_prefix
from modules.ops.ctc_prefix.pytorch import finite, log_probs_of

MINUS_INF = float("-inf")
LEAST = -700.0  # of a log-probability: its exponential is still a normal float64


class CTCPrefixScorer:
    """log p(g + c, ...) - log p(g, ...) for every token c after each of B x beam prefixes g.

    With n and b the probabilities that the first t frames read as g, ending in g's last token and
    in blank, and phi = n + b (b alone where c repeats the last token), in logarithms:

        psi(g + c) = sum over t of phi_t(g) p_{t + 1}(c)
        n_t(g + c) = (n_{t - 1}(g + c) + phi_{t - 1}(g)) p_t(c)
        b_t(g + c) = (n_{t - 1}(g + c) + b_{t - 1}(g + c)) p_t(blank)

    Only the hypotheses that a search keeps get their n and b. float64 throughout: cumulative sums
    of log-probabilities reach -1e4, and differences of them are wanted. Where a device has none
    (MPS) the scorer works on the CPU. Scores are float32, or float64 for float64 input.

    Arguments
    ---------
    log_probs (B, T, V), lengths (B,) in frames, at least 1
    beam_size, blank_index, eos_index : int
    """

    def __init__(self, log_probs, lengths, beam_size, blank_index, eos_index):
        self.result_device = log_probs.device
        self.result_dtype = torch.promote_types(log_probs.dtype, torch.float32)
        if log_probs.device.type == "mps":
            log_probs, lengths = log_probs.cpu(), lengths.cpu()
        batch, frames, self.vocab_size = log_probs.shape
        self.beam_size, self.blank_index, self.eos_index = beam_size, blank_index, eos_index
        device = log_probs.device
        valid = valid_frames(lengths, frames)
        # Frames last: a token's row over time is then dense, and read again at each step.
        probs = torch.empty(batch, self.vocab_size, frames, dtype=torch.float64, device=device)
        probs.copy_(log_probs.transpose(1, 2)).clamp_(min=LEAST).exp_()
        self.probs = probs.masked_fill_(~valid.unsqueeze(1), 0.0)

        # Rows are hypotheses from here on, utterance by utterance.
        utterances = torch.arange(batch, device=device).repeat_interleave(beam_size)
        self.first_row = utterances * self.vocab_size
        self.valid, self.lengths = valid[utterances], lengths[utterances].unsqueeze(1)
        rows = self.first_row + blank_index
        blanks = log_probs_of(self.probs.flatten(0, 1), rows, self.valid).cumsum(1)
        self.blanks = torch.nn.functional.pad(blanks, (1, 0))  # (B x beam, 1 + T)

        # After t = 0 .. T frames, of the empty prefix: only blanks so far.
        self.blank, self.total = self.blanks.clone(), self.blanks.clone()
        self.psi = torch.zeros(len(utterances), 1, dtype=torch.float64, device=device)
        self.last = torch.full_like(utterances, blank_index)
        self.next_psi = None

    def score(self):
        """-> (B x beam, V); minus infinity where CTC has no frame left, and for blank."""
        rows = self.first_row + self.last
        weights, largest, repeated = ctc_prefix.weights(
            self.probs.flatten(0, 1), rows, self.valid, self.blank, self.total
        )
        weights = weights.unflatten(0, (-1, self.beam_size))
        # The large factor first: MKL then takes half the time.
        psi = torch.bmm(self.probs, weights.transpose(1, 2)).transpose(1, 2).flatten(0, 1)
        psi = psi.log_().add_(largest)
        psi.scatter_(1, self.last.unsqueeze(1), repeated)
        psi[:, self.eos_index].copy_(self.total.gather(1, self.lengths).squeeze(1))
        psi[:, self.blank_index].fill_(MINUS_INF)
        self.next_psi = psi
        scores = psi - finite(self.psi)
        return scores.to(dtype=self.result_dtype).to(self.result_device)

    def advance(self, predecessors, tokens):
        """Replace the prefixes by the best extensions: predecessors, tokens (B x beam,).

        In place, after `score`, and never across utterances.
        """
        predecessors, tokens = (x.to(self.probs.device) for x in (predecessors, tokens))
        psi = self.next_psi.flatten().index_select(0, predecessors * self.vocab_size + tokens)
        self.psi.copy_(psi.unsqueeze(1))
        blank, total = ctc_prefix.extend(
            self.probs.flatten(0, 1),
            self.first_row + tokens,
            self.valid,
            self.blanks,
            self.blank,
            self.total,
            predecessors,
            tokens == self.last.index_select(0, predecessors),
        )
        self.blank.copy_(blank)
        self.total.copy_(total)
        self.last.copy_(tokens)
