"""StreamingCTC: samples as they come to the log-probabilities of one pass over all of them."""

import torch

from modules.errors import UserError


class StreamingCTC:
    """Samples in pieces of any size -> the log-probabilities of one pass over all of them.

    Its state is what features and frontend still read of the past, and the encoder's own.
    chunk_size: frames that a chunked encoder sees at a time; None: as it is packaged.
    UserError for a model that needs the future.
    """

    def __init__(self, recognizer, chunk_size=None):
        check_streams(recognizer)
        self.chunk_size = chunk_size
        self.features, self.normalize = recognizer.features, recognizer.normalize
        self.frontend, self.encoder = recognizer.model["frontend"], recognizer.model["encoder"]
        self.head, self.device = recognizer.model["ctc_head"], recognizer.device
        self.reset()

    def reset(self):
        """Before the first sample."""
        self.state = [
            self.features.initial_state(1),
            self.frontend.initial_state(1),
            self.encoder.start(1, self.chunk_size),
        ]

    @property
    def hop(self):
        """Samples from one frame to the next."""
        return self.frontend.subsampling * self.features.hop

    @property
    def lookahead(self):
        """Samples that must follow the time of a frame, the last of a chunk, to compute it."""
        frontend = self.frontend.lookahead * self.features.hop + self.features.reach
        return self.encoder.lookahead * self.hop + frontend

    @torch.inference_mode()
    def advance(self, samples, final=False):
        """samples (N,) -> log-probabilities (T, V) of the frames that they complete, on the CPU.

        final: the utterance ends here.
        """
        features_state, frontend_state, encoder_state = self.state
        x, features_state = self.features.advance(
            samples.to(self.device).unsqueeze(0), features_state, final
        )
        if x.shape[1]:
            x = self.normalize(x, torch.ones(1, device=self.device))
        x, frontend_state = self.frontend.advance(x, frontend_state, final)
        x, encoder_state = self.encoder.advance(x, encoder_state, final)
        self.state = [features_state, frontend_state, encoder_state]
        return self.head(x).log_softmax(dim=-1)[0].cpu()


def check_streams(recognizer):
    """UserError naming the part of a model that needs the future."""
    if not recognizer.model["encoder"].streams:
        raise UserError(
            "this model's encoder reads whole recordings, so it cannot stream; train "
            "hparams/CTC/conmamba_causal_small.yaml or conmamba_chunked_small.yaml, or use "
            "transcribe.py"
        )
    if recognizer.normalize.norm_type != "global":
        raise UserError(
            f"this model normalises features with norm_type={recognizer.normalize.norm_type}, "
            "which needs the whole recording; train with norm_type: global"
        )
    if recognizer.features.top_db is not None:
        raise UserError(
            f"this model's features have top_db={recognizer.features.top_db}, which needs the "
            "loudest frame of the whole recording; train with top_db: null in compute_features"
        )
