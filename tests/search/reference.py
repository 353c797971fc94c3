"""SpeechBrain's joint search over the same decoders, a loop over hypotheses: what ours must equal.

What it adds to `S2SBeamSearcher`: each utterance has limits of its own length (SpeechBrain's come
from the padded batch), and no blocked candidate ever wins or counts.
"""

import torch
from speechbrain.decoders.scorer import CTCScorer, ScorerBuilder, TransformerLMScorer
from speechbrain.decoders.seq2seq import S2SBeamSearcher
from torch.nn import functional as F  # noqa: N812

from modules.decoder import select_hypotheses
from modules.lengths import relative, zero_padding


class ReferenceSearch(S2SBeamSearcher):
    """Arguments as `modules.search.JointBeamSearch`."""

    def __init__(
        self,
        decoder,
        head,
        ctc_head=None,
        bos_index=1,
        eos_index=2,
        blank_index=0,
        beam_size=10,
        ctc_weight=0.0,
        temperature=1.0,
        min_decode_ratio=0.0,
        max_decode_ratio=1.0,
        length_normalization=True,
        using_eos_threshold=True,
        eos_threshold=1.5,
    ):
        scorers = [CTCScorer(ctc_head, blank_index, eos_index)] if ctc_weight else []
        super().__init__(
            bos_index,
            eos_index,
            min_decode_ratio,
            max_decode_ratio,
            beam_size,
            scorer=ScorerBuilder({"ctc": ctc_weight}, scorers) if scorers else None,
            length_normalization=length_normalization,
            using_eos_threshold=using_eos_threshold,
            eos_threshold=eos_threshold,
        )
        self.decoder, self.head, self.ctc_head = decoder, head, ctc_head
        self.blank_index, self.temperature = blank_index, temperature
        self.ctc_scorers = scorers

    def use_language_model(self, lm, weight, temperature=1.0):
        """Add a language model over the same tokens, in place of an earlier one.

        lm: SpeechBrain's `TransformerLM`, tokens (B, U) -> logits (B, U, V), put in eval mode here.
        Its log-probabilities, of logits divided by `temperature`, count `weight` times.
        """
        self.language_model = lm
        weights = {"transformerlm": weight}
        if self.ctc_scorers:
            weights = {"ctc": self.ctc_weight, **weights}
        self.scorer = ScorerBuilder(
            weights, [*self.ctc_scorers, TransformerLMScorer(lm, temperature)]
        )

    @torch.no_grad()
    def forward(self, memory, lengths):
        """Search.

        memory (B, T, D), lengths (B,) in frames, 0 allowed -> hypotheses, B lists of token ids
        without bos and eos; scores, B floats: the winner's sum, or its mean a token.
        """
        memory = zero_padding(memory, lengths)[:, : int(lengths.max())]
        if memory.shape[1] == 0:
            memory = F.pad(memory, (0, 0, 0, 1))
        most = (lengths * self.max_decode_ratio).long()
        if self.ctc_scorers:
            most = torch.minimum(most, lengths)
        fewest = torch.minimum((lengths * self.min_decode_ratio).long(), most)
        self.fewest_tokens = fewest.repeat_interleave(self.beam_size)
        self.most_tokens = most.repeat_interleave(self.beam_size)
        # An empty utterance is read as one frame of zeros and may only end.
        lengths = relative(lengths.clamp(min=1), memory.shape[1])
        hypotheses, _, scores, _ = super().forward(memory, lengths)
        return hypotheses, scores.tolist()

    def set_n_out(self):
        return self.head.out_features

    def change_max_decoding_length(self, min_decode_steps, max_decode_steps):
        """Run until the longest limit and its eos; `_set_eos_minus_inf_step` holds each limit."""
        return 0, int(self.most_tokens.max()) + 1

    def _update_reset_memory(self, enc_states, enc_lens):
        """Read the memory once an utterance, then share the state out to the beams."""
        _, scorer_memory = super()._update_reset_memory(enc_states, enc_lens)
        beams = torch.arange(self.batch_size, device=self.device).repeat_interleave(self.beam_size)
        state = select_hypotheses(self.decoder.start(enc_states, enc_lens), beams)
        return (state, state), scorer_memory

    def reset_mem(self, batch_size, device):
        """The decoder's state needs the memory: see `_update_reset_memory`."""
        return None

    def forward_step(self, inp_tokens, memory, enc_states, enc_lens):
        """inp_tokens (B x beams,), memory -> log-probabilities (B x beams, V), memory, None."""
        state, start = memory
        x, state = self.decoder.advance(inp_tokens.unsqueeze(1), state)
        logits = self.head(x[:, 0]) / self.temperature
        log_probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        log_probs[:, [self.blank_index, self.bos_index]] = self.minus_inf
        return log_probs, (state, start), None

    def permute_mem(self, memory, index):
        """Give each surviving hypothesis, index (B x beams,), its predecessor's state."""
        state, start = memory
        return select_hypotheses(state, index), start

    def _set_eos_minus_inf_step(self, log_probs, step, min_decode_steps):
        """Hold each utterance to its own limits, where SpeechBrain takes the padded batch's."""
        self.may_end = step >= self.fewest_tokens
        end = log_probs[:, self.eos_index].clone()
        log_probs = log_probs.masked_fill((step >= self.most_tokens).unsqueeze(1), self.minus_inf)
        log_probs[:, self.eos_index] = end
        return log_probs

    def _eos_threshold_step(self, log_probs):
        if self.using_eos_threshold:
            self.may_end &= self._check_eos_threshold(log_probs)
        return log_probs

    def _check_eos_threshold(self, log_probs):
        """A sure eos has log-probability 0, which fails SpeechBrain's 0 > eos_threshold x 0."""
        best = log_probs.argmax(dim=-1) == self.eos_index
        return best | super()._check_eos_threshold(log_probs)

    def _scorer_step(self, inp_tokens, scorer_memory, attn, log_probs):
        """Add the scorers, then block eos where it may not come yet.

        A hypothesis that can take no other token may always end: it is at its limit, or CTC has no
        frame left for one.
        """
        log_probs, scorer_memory = super()._scorer_step(inp_tokens, scorer_memory, attn, log_probs)
        end = log_probs[:, self.eos_index].clone()
        log_probs[:, self.eos_index] = self.minus_inf
        stuck = ~self._is_live(log_probs).any(dim=1)
        log_probs[:, self.eos_index] = end.masked_fill(~(self.may_end | stuck), self.minus_inf)
        return log_probs, scorer_memory

    def _is_live(self, scores):
        """Tell scores from sums that hold a blocked token: those are under -1e20 / tokens."""
        return scores > self.minus_inf * 1e-10

    def _update_hyps_and_scores_if_eos_token(
        self, inp_tokens, alived_hyps, eos_hyps_and_log_probs_scores, scores
    ):
        """Finish live hypotheses only: with few live ones, blocked ones fill the beam."""
        live = torch.where(self._is_live(scores), inp_tokens, self.bos_index)
        super()._update_hyps_and_scores_if_eos_token(
            live, alived_hyps, eos_hyps_and_log_probs_scores, scores
        )
        return inp_tokens == self.eos_index

    def _check_end_condition(self, alived_hyps):
        return not self._is_live(alived_hyps.sequence_scores).any()

    def _fill_alived_hyps_with_eos_token(self, alived_hyps, eos_hyps_and_log_probs_scores, scores):
        """Fill each list up to the beam size with empty hypotheses that never win.

        All live ones have ended, as the last step allows nothing but eos.
        """
        filler = (
            alived_hyps.alived_seq.new_full((1,), self.eos_index),
            alived_hyps.alived_log_probs.new_zeros(1),
            scores.new_tensor(float("-inf")),
        )
        return [
            finished + [filler] * (self.beam_size - len(finished))
            for finished in eos_hyps_and_log_probs_scores
        ]


class RecomputingSearch(ReferenceSearch):
    """Runs the decoder over memory and whole prefix at each step."""

    def _update_reset_memory(self, enc_states, enc_lens):
        _, scorer_memory = super()._update_reset_memory(enc_states, enc_lens)
        prefix = torch.empty(self.n_bh, 0, dtype=torch.long)
        return prefix, scorer_memory

    def forward_step(self, inp_tokens, memory, enc_states, enc_lens):
        prefix = torch.cat([memory, inp_tokens.unsqueeze(1)], dim=1)
        lengths = torch.full((len(prefix),), prefix.shape[1])
        x, _ = self.decoder(prefix, lengths, enc_states, enc_lens)
        log_probs = (self.head(x[:, -1]) / self.temperature).log_softmax(dim=-1)
        log_probs[:, [self.blank_index, self.bos_index]] = self.minus_inf
        return log_probs, prefix, None

    def permute_mem(self, memory, index):
        return memory[index]
