"""Augmentations on the device: SpeechBrain's, and rooms and noise, which it has from recordings.

All draw anew for every utterance. Nothing here asks the device for a number: the host, which has
the next kernels to launch, would wait for all that are underway.
"""

import functools
import math
import random

import torch
from speechbrain.utils.callchains import lengths_arg_exists
from torch import nn

from modules.fourier import irfft, rfft, transform_length
from modules.lengths import valid_frames


class Augmenter(nn.Module):
    """All augmentations, one after the other, for some batches.

    SpeechBrain's `Augmenter`, which has more choices, draws on the device how many to apply.

    Arguments
    ---------
    augmentations : list of modules
        SpeechBrain's or ours, called with x and, where they take them, lengths.
    augment_prob : float
        Share of the batches.
    """

    def __init__(self, augmentations, augment_prob=1.0):
        super().__init__()
        self.augment_prob = augment_prob
        self.augmentations = [(a, lengths_arg_exists(a.forward)) for a in augmentations]

    def forward(self, x, lengths):
        """x (B, T, ...), relative lengths (B,) -> the same."""
        if random.random() > self.augment_prob:
            return x, lengths
        for augment, takes_lengths in self.augmentations:
            x = augment(x, lengths=lengths) if takes_lengths else augment(x)
            if isinstance(x, tuple):
                x, lengths = x
        return x, lengths


class SpectrogramDrop(nn.Module):
    """Zeros in place of some stretches of time or mel bins: SpecAugment (Park et al. 2019).

    As SpeechBrain's `SpectrogramDrop`, but that what is drawn stays on the device.

    Arguments
    ---------
    drop_length_low, drop_length_high : int
        Frames or bins of a stretch, from the first to one less than the second.
    drop_count_low, drop_count_high : int
        Stretches an utterance; as many in all of a batch.
    dim : int
        1: time, 2: mel bins.
    """

    def __init__(
        self, drop_length_low=5, drop_length_high=15, drop_count_low=1, drop_count_high=3, dim=1
    ):
        super().__init__()
        self.drop_length_low, self.drop_length_high = drop_length_low, drop_length_high
        self.drop_count_low, self.drop_count_high, self.dim = drop_count_low, drop_count_high, dim

    def forward(self, spectrogram):
        """(B, T, n_mels) -> the same."""
        size, most = spectrogram.shape[self.dim], self.drop_count_high
        draw = functools.partial(torch.randint, device=spectrogram.device)
        count = draw(self.drop_count_low, most + 1, (1,))
        shape = len(spectrogram), most, 1
        start = draw(0, max(1, size), shape)
        end = start + draw(self.drop_length_low, self.drop_length_high, shape)
        place = torch.arange(size, device=spectrogram.device)
        dropped = (start <= place) & (place < end) & valid_frames(count, most).unsqueeze(2)
        dropped = dropped.any(dim=1).unsqueeze(3 - self.dim)
        return spectrogram.masked_fill(dropped, 0.0)


class Reverberation(nn.Module):
    """Noise that dies away, added to the direct sound: a room's response (Polack 1988).

    Arguments
    ---------
    rt60_low, rt60_high : float
        Seconds until the room has lost 60 dB.
    drr_low, drr_high : float
        Energy of the direct sound over that of the room, dB.
    sample_rate : int
        Hz.
    """

    def __init__(self, rt60_low=0.1, rt60_high=0.6, drr_low=-3, drr_high=15, sample_rate=16000):
        super().__init__()
        self.rt60, self.drr, self.sample_rate = (
            (rt60_low, rt60_high),
            (drr_low, drr_high),
            sample_rate,
        )

    def forward(self, waveforms):
        """(B, N) -> (B, N); what sounds on after the last sample is cut off."""
        size = len(waveforms), 1
        rt60, drr = (
            low + (high - low) * torch.rand(size, device=waveforms.device)
            for low, high in (self.rt60, self.drr)
        )
        time = torch.arange(1, round(self.rt60[1] * self.sample_rate), device=waveforms.device)
        room = torch.randn(len(waveforms), len(time), device=waveforms.device)
        room = room * torch.exp(-3 * math.log(10) * time / self.sample_rate / rt60)
        room = room / room.norm(dim=1, keepdim=True) * 10 ** (-drr / 20)
        points = transform_length(waveforms.shape[1] + len(time))
        spectrum = rfft(waveforms, points)
        response = 1 + rfft(nn.functional.pad(room, (1, 0)), points)
        return irfft(spectrum * response, points)[:, : waveforms.shape[1]]


def coloured_noise(waveforms):
    """Noise like (B, N), of a colour from white to brown: power falls with frequency's square."""
    points = transform_length(waveforms.shape[1])
    noise = torch.randn(len(waveforms), points, device=waveforms.device)
    spectrum = rfft(noise, points)
    slope = torch.rand(len(waveforms), 1, device=waveforms.device)
    frequency = torch.arange(1, spectrum.shape[1] + 1, device=waveforms.device)
    return irfft(spectrum * frequency**-slope, points)[:, : waveforms.shape[1]]
