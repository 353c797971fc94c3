"""Joint CTC/attention beam search over a decoder with carried state."""

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from modules.decoder import select_hypotheses
from modules.lengths import zero_padding
from modules.search import graph
from modules.search.beams import Beams
from modules.search.language import start_language_model
from modules.search.prefix import CTCPrefixScorer
from modules.search.step import TokenStep


class JointBeamSearch(nn.Module):
    """Beam search over (1 - ctc_weight) decoder + ctc_weight CTC + LM weight x LM, a sum of logs.

    The CTC term is the prefix score of Watanabe et al. 2017 (Hybrid CTC/attention, algorithm 2),
    of every token. The decoder reads each utterance's memory once; after that it advances by one
    token a step. Hypotheses live on the device, which is asked only now and then whether they are
    finished. On CUDA a token is one graph where the decoder's state does not grow.
    Modules are shared, not copied: the searcher stands beside them in a YAML file and belongs in
    no checkpoint. An utterance's search ends with `beam_size` finished hypotheses, or when none
    is left.

    Arguments
    ---------
    decoder : modules.decoder.Decoder
    head : torch.nn.Linear
        Decoder's output -> logits over the vocabulary.
    ctc_head : torch.nn.Linear or None
        Memory -> logits over the same vocabulary; needed when ctc_weight > 0.
    bos_index, eos_index, blank_index : int
        Three different tokens; bos and blank are never part of a hypothesis. Blank is 0, which
        SpeechBrain's language models read as padding.
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
        if not isinstance(beam_size, int) or beam_size < 1:
            raise ValueError(
                f"beam_size={beam_size} must be a whole number, at least 1, which is greedy search"
            )
        if not 0 <= min_decode_ratio <= max_decode_ratio or max_decode_ratio == 0:
            raise ValueError(
                f"min_decode_ratio={min_decode_ratio}, max_decode_ratio={max_decode_ratio}: "
                "use 0 <= min <= max, and max above 0"
            )
        if not temperature > 0:
            raise ValueError(f"temperature={temperature} must be positive")
        super().__init__()
        self.decoder, self.head, self.ctc_head = decoder, head, ctc_head
        self.bos_index, self.eos_index, self.blank_index = bos_index, eos_index, blank_index
        self.beam_size, self.ctc_weight, self.temperature = beam_size, ctc_weight, temperature
        self.min_decode_ratio, self.max_decode_ratio = min_decode_ratio, max_decode_ratio
        self.length_normalization = length_normalization
        self.using_eos_threshold, self.eos_threshold = using_eos_threshold, eos_threshold
        self.language_model = None

    def use_language_model(self, lm, weight, temperature=1.0):
        """Add a language model over the same tokens, in place of an earlier one.

        lm: tokens (B, U) -> logits (B, U, V), as `start_language_model` takes it; put in eval mode.
        Its log-probabilities, of logits divided by `temperature`, count `weight` times.
        """
        self.language_model = lm.eval()
        self.lm_weight, self.lm_temperature = weight, temperature

    @torch.no_grad()
    def forward(self, memory, lengths):
        """Search.

        memory (B, T, D), lengths (B,) in frames, 0 allowed -> hypotheses, B lists of token ids
        without bos and eos; scores, B floats: the winner's sum, or its mean a token.
        """
        with graph.side_stream(memory.device):
            frames, max_tokens = self.sizes(lengths)
            step = graph.begin(self, memory, lengths, frames, max_tokens)
            graph.run(step, max_tokens)
            return step.beams.best()

    def release(self):
        """Give back the memory of this thread's CUDA graphs; the next searches make new ones."""
        graph.release(self)

    def limits(self, lengths):
        """Fewest and most tokens of each utterance, eos not counted: lengths (B,) -> (B,), (B,)."""
        most = (lengths * self.max_decode_ratio).long()
        if self.ctc_weight:
            most = torch.minimum(most, lengths)
        return torch.minimum((lengths * self.min_decode_ratio).long(), most), most

    def sizes(self, lengths):
        """-> frames of the longest utterance and tokens of the longest search, eos counted."""
        _, most = self.limits(lengths)
        frames, tokens = torch.stack([lengths.max(), most.max()]).tolist()
        return max(frames, 1), tokens + 1

    def begin(self, memory, lengths, frames, max_tokens):
        """Read the memory: the search's `TokenStep`, of `sizes` or larger ones."""
        memory = zero_padding(memory, lengths)[:, :frames]
        memory = F.pad(memory, (0, 0, 0, frames - memory.shape[1]))
        fewest, most = self.limits(lengths)
        # An empty utterance is read as one frame of zeros and may only end.
        lengths = lengths.clamp(min=1)

        rows = torch.arange(len(memory), device=memory.device).repeat_interleave(self.beam_size)
        beams = Beams(
            len(memory),
            self.beam_size,
            max_tokens,
            self.bos_index,
            self.eos_index,
            self.length_normalization,
            memory.device,
            torch.promote_types(memory.dtype, torch.float32),
        )
        # Read once an utterance, then shared out to its beams.
        state = select_hypotheses(self.decoder.start(memory, lengths), rows)
        ctc = self.start_ctc(memory, lengths) if self.ctc_weight else None
        language_model = None
        if self.language_model is not None:
            language_model = start_language_model(
                self.language_model, self.lm_weight, self.lm_temperature, len(rows)
            )
        return TokenStep(self, beams, state, ctc, language_model, fewest[rows], most[rows])

    def start_ctc(self, memory, lengths):
        logits = self.ctc_head(memory)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return CTCPrefixScorer(
            logits.log_softmax(-1), lengths, self.beam_size, self.blank_index, self.eos_index
        )
