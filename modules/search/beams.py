"""The hypotheses of a beam search, as tensors of fixed shapes on the device."""

import torch

MINUS_INF = float("-inf")
# What counts as a score: below are SpeechBrain's stand-ins for minus infinity, and NaN is no score.
LEAST = -1e10


class Beams:
    """B x beam hypotheses a step, their ancestry, and the best finished one of each utterance.

    Nothing here depends on values on the host, so `extend` can be captured in a CUDA graph. A
    step's hypotheses are kept as (token, predecessor); `best` walks them back once, at the end.

    Arguments
    ---------
    batch, beam_size, max_tokens : int
        The search takes at most `max_tokens` steps, eos counted.
    bos_index, eos_index : int
    length_normalization : bool
        Compare sums divided by the number of tokens, eos counted.
    device, dtype : of the scores
    """

    def __init__(
        self,
        batch,
        beam_size,
        max_tokens,
        bos_index,
        eos_index,
        length_normalization,
        device,
        dtype,
    ):
        self.beam_size, self.eos_index = beam_size, eos_index
        self.length_normalization = length_normalization
        rows = batch * beam_size
        self.step = torch.zeros((), dtype=torch.long, device=device)
        self.tokens = torch.full((rows,), bos_index, device=device)
        # One hypothesis to begin with: the others would be its copies.
        self.scores = torch.full((batch, beam_size), MINUS_INF, dtype=dtype, device=device)
        self.scores[:, 0].zero_()
        self.first_row = (torch.arange(batch, device=device) * beam_size).unsqueeze(1)
        self.history = torch.zeros(max_tokens, 2, rows, dtype=torch.long, device=device)
        self.num_finished = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.best_score = torch.full((batch,), MINUS_INF, dtype=dtype, device=device)
        self.best_place = torch.zeros(2, batch, dtype=torch.long, device=device)  # step, row

    def extend(self, log_probs):
        """Keep the best: log_probs (B x beam, V) of next tokens -> predecessors (B x beam,).

        Finished hypotheses leave the beam. An utterance takes its first `beam_size` of them, the
        better ones of a step first; of later ones, which a long search would find, it hears no
        more.
        """
        vocab_size = log_probs.shape[1]
        sums = self.scores.unsqueeze(2) + log_probs.unflatten(0, (-1, self.beam_size))
        count = self.step + 1 if self.length_normalization else 1
        scores = (sums / count).flatten(1)
        scores.masked_fill_(~(scores > LEAST), MINUS_INF)  # NaN too
        scores, candidates = scores.topk(self.beam_size, dim=1)
        rows = self.first_row + candidates // vocab_size
        tokens = candidates % vocab_size

        live = scores > LEAST
        ends = live & (tokens == self.eos_index)
        self._finish(ends, scores)
        self.scores.copy_((scores * count).masked_fill(~live | ends, MINUS_INF))
        self.tokens.copy_(tokens.flatten())
        predecessors = rows.flatten()
        step = torch.stack([self.tokens, predecessors]).unsqueeze(0)
        self.history.index_copy_(0, self.step.unsqueeze(0), step)
        self.step.add_(1)
        return predecessors

    def _finish(self, ends, scores):
        """Take note of hypotheses that end now: ends (B, beam) bool, scores (B, beam)."""
        order = self.num_finished + ends.cumsum(1)
        heard = ends & (order <= self.beam_size)
        score, place = scores.masked_fill(~heard, MINUS_INF).max(1)
        better = score > self.best_score
        self.best_score.copy_(torch.where(better, score, self.best_score))
        row = self.first_row.squeeze(1) + place
        now = torch.stack([self.step.expand_as(row), row])
        self.best_place.copy_(torch.where(better, now, self.best_place))
        self.num_finished.copy_(order[:, -1:])

    def done(self):
        """Bool on the device: no utterance can find anything better."""
        full = self.num_finished >= self.beam_size
        return (full | (self.scores <= LEAST)).all()

    def best(self):
        """-> B lists of tokens without eos, B scores; [] and minus infinity where none finished."""
        # One transfer each, at the end of the search.
        history, places = self.history.cpu(), self.best_place.t().tolist()
        scores = self.best_score.tolist()
        hypotheses = []
        for (step, row), score in zip(places, scores, strict=True):
            hypothesis = []
            row = int(history[step, 1, row])
            while score > MINUS_INF and step > 0:
                step -= 1
                token, row = history[step, :, row].tolist()
                hypothesis.append(token)
            hypotheses.append(hypothesis[::-1])
        return hypotheses, scores
