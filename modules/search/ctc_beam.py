"""CTC prefix beam search of a batch on its device (Graves et al. 2006; Hannun et al. 2014)."""

import torch

MINUS_INF = float("-inf")
NOBODY = -1  # of a prefix that is none, and of its parent


class PrefixBeams:
    """B x K prefixes with the probabilities b and n of having read them, ending in blank or not.

    A prefix has a 63-bit hash for its name, so that an extension of one that equals another in the
    beam is found by comparing numbers. Dropped ones are nobody's and have probability 0.

    log_probs' (B, V) frames come one by one; nothing here waits for the device.
    """

    def __init__(self, batch, beam_size, frames, blank_index, device, dtype):
        shape = (batch, beam_size)
        self.blank_index = blank_index
        self.b = torch.full(shape, MINUS_INF, dtype=dtype, device=device)
        self.b[:, 0] = 0.0  # the empty prefix
        self.n = torch.full_like(self.b, MINUS_INF)
        self.last = torch.full(shape, blank_index, device=device)
        self.name = torch.full(shape, NOBODY, device=device)
        self.name[:, 0] = 0
        self.parent = torch.full(shape, NOBODY, device=device)
        self.rows = torch.arange(beam_size, device=device).expand(shape)
        self.history = torch.empty(frames, 2, *shape, dtype=torch.long, device=device)

    def read(self, t, log_probs, alive, prune):
        """Frame t: log_probs (B, V), alive (B,) bool, False past an utterance's length."""
        num_tokens = log_probs.shape[1]
        total = torch.logaddexp(self.b, self.n)
        blank = total + log_probs[:, self.blank_index, None]
        # The last token of the empty prefix is blank, but its n is 0, so nothing comes of it.
        again = self.n + log_probs.gather(1, self.last)
        longer = total.unsqueeze(2) + log_probs.unsqueeze(1)  # (B, K, V)
        repeated = self.b + log_probs.gather(1, self.last)
        longer.scatter_(2, self.last.unsqueeze(2), repeated.unsqueeze(2))
        longer[:, :, self.blank_index].fill_(MINUS_INF)

        # What extends g to h, where h is in the beam too, goes to h: child (B, g, h).
        child = (self.name.unsqueeze(2) == self.parent.unsqueeze(1)) & (self.name >= 0).unsqueeze(2)
        to_child = longer.gather(2, self.last.unsqueeze(1).expand_as(child))
        again = torch.logaddexp(again, to_child.masked_fill(~child, MINUS_INF).amax(1))
        taken = torch.zeros_like(longer).scatter_add_(
            2, self.last.unsqueeze(1).expand_as(child), child.to(longer.dtype)
        )
        longer.masked_fill_(taken > 0, MINUS_INF)

        scores = torch.cat([torch.logaddexp(blank, again), longer.flatten(1)], dim=1)
        scores, picked = scores.topk(self.rows.shape[1], dim=1)
        dropped = ~(scores >= scores[:, :1] + prune)  # NaN too
        grown = picked >= self.rows.shape[1]
        place = picked - self.rows.shape[1]
        row = torch.where(grown, place // num_tokens, picked)
        token = torch.where(grown, place % num_tokens, NOBODY)
        self._replace(row, token, grown, dropped, scores, blank, again, alive.unsqueeze(1))
        moved = torch.stack([token, row])
        stays = torch.stack([torch.full_like(token, NOBODY), self.rows])
        self.history[t] = torch.where(alive[:, None], moved, stays)

    def _replace(self, row, token, grown, dropped, scores, blank, again, alive):
        """Move to the picked prefixes: all (B, K), alive (B, 1)."""
        name, parent = self.name.gather(1, row), self.parent.gather(1, row)
        # A linear congruential step (Knuth's MMIX), wrapping at 64 bits, without the sign.
        longer = (name * 6364136223846793005 + token * 1442695040888963407 + 1) & (2**63 - 1)
        new = {
            "b": blank.gather(1, row).masked_fill(grown | dropped, MINUS_INF),
            "n": torch.where(grown, scores, again.gather(1, row)).masked_fill(dropped, MINUS_INF),
            "last": torch.where(grown, token, self.last.gather(1, row)),
            "name": torch.where(grown, longer, name).masked_fill(dropped, NOBODY),
            "parent": torch.where(grown, name, parent).masked_fill(dropped, NOBODY),
        }
        for key, value in new.items():
            setattr(self, key, torch.where(alive, value, getattr(self, key)))

    def best(self):
        """-> B lists of tokens."""
        row = torch.logaddexp(self.b, self.n).argmax(1).tolist()
        history = self.history.cpu().numpy()
        hypotheses = []
        for i, k in enumerate(row):
            hypothesis = []
            for tokens, predecessors in history[::-1, :, i]:
                token, k = tokens[k], predecessors[k]
                if token != NOBODY:
                    hypothesis.append(int(token))
            hypotheses.append(hypothesis[::-1])
        return hypotheses


@torch.no_grad()
def ctc_beam(log_probs, lengths, beam_size, beam_prune_logp, token_prune_min_logp, blank_index=0):
    """Best prefix of each utterance: log_probs (B, T, V), lengths (B,) -> B lists of token ids.

    beam_prune_logp : prefixes this far under the best one are dropped
    token_prune_min_logp : of each frame only its best token counts, and those above this
    """
    dtype = torch.promote_types(log_probs.dtype, torch.float32)
    batch, frames, _ = log_probs.shape
    best = log_probs.argmax(2, keepdim=True)
    kept = (log_probs > token_prune_min_logp).scatter_(2, best, True)
    log_probs = log_probs.to(dtype).masked_fill(~kept, MINUS_INF)
    beams = PrefixBeams(batch, beam_size, frames, blank_index, log_probs.device, dtype)
    for t in range(frames):
        beams.read(t, log_probs[:, t], t < lengths, beam_prune_logp)
    return beams.best()
