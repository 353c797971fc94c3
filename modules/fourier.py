"""Fourier transforms of few sizes.

On a GPU every number of rows and of points is a plan of cuFFT's. While it makes one, the host waits
until the device has done all its work; and batches of speech hardly ever have one size twice.
"""

import torch
from torch.nn import functional as F  # noqa: N812


def transform_length(size):
    """As many or up to a quarter more: few sizes, and of points such as have small factors."""
    step = 1 << max(size.bit_length() - 3, 0)
    return -(-size // step) * step


def rfft(x, points):
    """torch.fft.rfft of rows (B, N) -> (B, points // 2 + 1)."""
    return torch.fft.rfft(_few_rows(x), points)[: len(x)]


def irfft(x, points):
    """torch.fft.irfft of rows (B, points // 2 + 1) -> (B, points)."""
    return torch.fft.irfft(_few_rows(x), points)[: len(x)]


def _few_rows(x):
    spare = transform_length(len(x)) - len(x) if x.is_cuda else 0
    return F.pad(x, (0, 0, 0, spare)) if spare else x


def short_time(x, window, hop):
    """Spectra of windowed frames, one every `hop` samples, as torch.stft's with center=False.

    x (B, N), window (points,) -> (B, T, points // 2 + 1), T = (N - points) // hop + 1
    """
    batch, samples = x.shape
    points = len(window)
    frames = (samples - points) // hop + 1
    # One signal of them all, of whole hops each; frames over two utterances are left out.
    each = -(-samples // hop)
    rows = transform_length(batch * each)
    signal = x.new_zeros(rows * hop + points)
    signal[: batch * each * hop].view(batch, each * hop)[:, :samples] = x
    spectra = torch.fft.rfft(signal.unfold(0, points, hop)[:rows] * window)
    return spectra[: batch * each].unflatten(0, (batch, each))[:, :frames]
