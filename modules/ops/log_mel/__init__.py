"""Log-mel features on a GPU: framing, power, filters, logarithm and limit in three passes.

As tensor operations around the Fourier transform they are a dozen, over tensors that are much
larger than the waveforms and the features. The transform itself is cuFFT's.
"""

import os
from typing import NamedTuple

import torch

from modules.ops import kernels
from modules.ops.backends import OK, Call


class Bands(NamedTuple):
    """Filters without their zeros: first bins (n_mels,), weights from there on (taps, n_mels)."""

    firsts: torch.Tensor
    weights: torch.Tensor


def bands_of(banks):
    """Filters (bins, n_mels), of which each lets some neighbouring bins through, as `Bands`."""
    through = banks != 0
    bin = torch.arange(len(banks), device=banks.device).unsqueeze(1)
    firsts = through.byte().argmax(dim=0)
    taps = int((bin * through - firsts).max()) + 1
    index = firsts + bin[:taps]
    weights = banks.gather(0, index.clamp(max=len(banks) - 1))
    return Bands(firsts.int(), weights.masked_fill(index >= len(banks), 0.0))


def supports(wavs):
    """Whether the kernels do it for waveforms (B, N), of which nothing is to be learnt.

    They never do where the environment has MAMBA_ASR_FEATURES_BACKEND=torch.
    """
    if os.environ.get("MAMBA_ASR_FEATURES_BACKEND") == "torch" or torch.compiler.is_compiling():
        return False
    call = Call(wavs.device.type, wavs.dtype, 1, True, initial_state=False, return_state=False)
    learns = wavs.requires_grad and torch.is_grad_enabled()
    return not learns and kernels.supports(call) == OK and kernels.availability() == OK


def log_mel(wavs, window, bands, hop, *, amin, reach=0, lengths=None, top_db=None):
    """10 log10 of the power, no less than `amin`, that triangular filters let through.

    wavs: (B, N); window: (points,); bands: `bands_of` (points // 2 + 1, n_mels); hop: samples
    reach: zeros that stand before and after the samples
    lengths: (B,) in frames, past which the result is zero
    top_db: where given, with lengths, nothing is more than so much below an utterance's loudest.
    -> (B, T, n_mels) in float32, T = (N + 2 reach - points) // hop + 1
    """
    from modules.ops.log_mel.triton import log_mel

    return log_mel(wavs, window, bands, hop, amin, reach, lengths, top_db)
