"""Joint CTC/attention beam search: SpeechBrain's searcher over a decoder with carried state.

What it adds to `S2SBeamSearcher`: the memory is read once, each utterance has limits of its own
length (SpeechBrain's come from the padded batch), and no blocked candidate ever wins or counts.
"""

import torch
from speechbrain.decoders.scorer import CTCScorer, ScorerBuilder, TransformerLMScorer
from speechbrain.decoders.seq2seq import S2SBeamSearcher
from torch.nn import functional as F  # noqa: N812

from modules.decoder import select_hypotheses
from modules.lengths import relative, zero_padding


class JointBeamSearch(S2SBeamSearcher):
    """Beam search over (1 - ctc_weight) decoder + ctc_weight CTC + LM weight x LM, a sum of logs.

    The CTC term is the prefix score of Watanabe et al. 2017 (Hybrid CTC/attention, algorithm 2).
    The decoder reads each utterance's memory once; after that it advances by one token a step.
    Modules are shared, not copied: the searcher stands beside them in a YAML file and belongs in
    no checkpoint. One search at a time: as in SpeechBrain, the object holds the running search.

    Arguments
    ---------
    decoder : modules.decoder.Decoder
    head : torch.nn.Linear
        Decoder's output -> logits over the vocabulary.
    ctc_head : torch.nn.Linear or None
        Memory -> logits over the same vocabulary; needed when ctc_weight > 0.
    bos_index, eos_index, blank_index : int
        Three different tokens; bos and blank are never part of a hypothesis. SpeechBrain's prefix
        score wants blank_index 0.
    beam_size : int
        Hypotheses kept an utterance; 1 is greedy search.
    ctc_weight : float
        In [0, 1).
    temperature : float
        Divides the decoder's logits.
    min_decode_ratio, max_decode_ratio : float
        Fewest and most tokens, eos not counted, for each memory frame of the utterance itself. CTC
        needs a frame a token, so with it the most is never above the number of frames.
    length_normalization : bool
        Compare sums divided by the number of tokens, eos counted.
    using_eos_threshold, eos_threshold : bool, float
        Allow eos only where its log-probability is above eos_threshold x the best one's (Hannun et
        al. 2019, arXiv 1904.02619, section 3.1.2).

    ValueError for a value outside its range.
    """

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
        if not 0 <= ctc_weight < 1:
            raise ValueError(
                f"ctc_weight={ctc_weight} is not in [0, 1); use CTCSearch for CTC alone"
            )
        if ctc_weight > 0 and ctc_head is None:
            raise ValueError(f"ctc_weight={ctc_weight} needs a ctc_head; pass one or use 0")
        if blank_index != 0 or len({blank_index, bos_index, eos_index}) < 3:
            raise ValueError(
                f"blank_index={blank_index}, bos_index={bos_index}, eos_index={eos_index}: "
                "they must differ and blank must be 0"
            )
        if beam_size < 1:
            raise ValueError(f"beam_size={beam_size} must be at least 1, which is greedy search")
        if not 0 <= min_decode_ratio <= max_decode_ratio:
            raise ValueError(
                f"min_decode_ratio={min_decode_ratio}, max_decode_ratio={max_decode_ratio}: "
                "use 0 <= min <= max"
            )
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
        return reorder(state, start, index), start

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
