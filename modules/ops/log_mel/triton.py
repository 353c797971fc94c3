"""Windowed frames by a kernel, their spectra by cuFFT, log-mel features by two more kernels."""

import torch

from modules.fourier import transform_length
from modules.ops.log_mel.triton_kernels import frames_kernel, limit_kernel, mel_kernel

FRAMES = 8  # of a program that cuts them
ROWS = 16  # of a program that filters them
NUMBERS = 4096  # of a program that limits them


def log_mel(wavs, window, bands, hop, amin, reach, lengths, top_db):
    """As `modules.ops.log_mel.log_mel`."""
    (batch, samples), points, (taps, n_mels) = wavs.shape, len(window), bands.weights.shape
    frames = (samples + 2 * reach - points) // hop + 1
    # More rows than are written or read: cuFFT has a plan for every number of them.
    cut = wavs.new_empty(transform_length(batch * frames), points, dtype=torch.float32)
    out = wavs.new_empty(batch, frames, n_mels, dtype=torch.float32)
    limits = top_db is not None
    loudest = wavs.new_full((batch if limits else 0,), float("-inf"), dtype=torch.float32)
    if not out.numel():
        return out
    lengths = lengths if lengths is None else lengths.contiguous()
    # Triton launches on the current device, whatever the tensors' own.
    with torch.cuda.device_of(wavs):
        frames_kernel[-(-frames // FRAMES), batch](
            *(wavs.contiguous(), window, cut, samples, frames),
            HOP=hop,
            REACH=reach,
            POINTS=points,
            WIDTH=1 << (points - 1).bit_length(),
            ROWS=FRAMES,
        )
        spectra = torch.fft.rfft(cut).view(torch.int64)
        mel_kernel[-(-frames // ROWS), batch](
            *(spectra, *bands, lengths, out, loudest, frames, amin),
            BINS=points // 2 + 1,
            MELS=n_mels,
            TAPS=taps,
            WIDTH=max(16, 1 << (n_mels - 1).bit_length()),
            ROWS=ROWS,
            LIMITS=limits,
        )
        if limits:
            limit_kernel[-(-frames * n_mels // NUMBERS), batch](
                *(out, lengths, loudest, frames * n_mels, top_db), MELS=n_mels, SIZE=NUMBERS
            )
    return out
