"""Log-mel features: waveforms (B, N) -> (B, T, n_mels), an utterance's own whatever its batch."""

import torch
from speechbrain.lobes.features import Fbank
from torch import nn


class Features(nn.Module):
    """SpeechBrain's `Fbank` whose dynamic range is taken over an utterance's own frames.

    SpeechBrain raises everything more than `top_db` below the loudest frame, and takes the
    loudest over the padding too, where the window still sees the end of a sound that is cut off.

    Arguments
    ---------
    sample_rate : int
        Hz.
    n_fft : int
        Points of the Fourier transform.
    win_length, hop_length : int
        Window and step, ms.
    n_mels : int
        Channels.
    top_db : float
        Dynamic range, dB.
    """

    def __init__(
        self, sample_rate=16000, n_fft=400, win_length=25, hop_length=10, n_mels=80, top_db=80.0
    ):
        super().__init__()
        self.hop = sample_rate * hop_length // 1000
        self.top_db = top_db
        self.fbank = Fbank(
            sample_rate=sample_rate,
            n_fft=n_fft,
            win_length=win_length,
            hop_length=hop_length,
            n_mels=n_mels,
        )
        self.fbank.compute_fbanks.top_db = float("inf")

    def forward(self, wavs, lengths):
        """wavs (B, N), zero past lengths (B,) in samples -> (B, T, n_mels), lengths in frames.

        An utterance of N samples has N // hop + 1 frames.
        """
        x = self.fbank(wavs)
        lengths = torch.div(lengths, self.hop, rounding_mode="floor") + 1
        time = torch.arange(x.shape[1], device=x.device)
        padded = (time >= lengths.unsqueeze(1)).unsqueeze(2)
        loudest = x.masked_fill(padded, float("-inf")).amax(dim=(1, 2), keepdim=True)
        return torch.maximum(x, loudest - self.top_db).masked_fill(padded, 0.0), lengths
