"""Log-mel features in numpy, those of `modules.features.Features`."""

import numpy as np


class Features:
    """
    Arguments
    ---------
    settings : dict
        `features` of an exported file's description; lengths in samples.
    sample_rate : int
        Hz.
    """

    def __init__(self, settings, sample_rate):
        self.n_fft, self.hop = settings["n_fft"], settings["hop_length"]
        self.amin, self.top_db = settings["amin"], settings["top_db"]
        # A Hamming window, periodic, in the middle of the transform.
        width = settings["win_length"]
        before = (self.n_fft - width) // 2
        self.window = np.zeros(self.n_fft)
        phase = 2 * np.pi * np.arange(width) / width
        self.window[before : before + width] = 0.54 - 0.46 * np.cos(phase)
        self.filters = mel_filters(
            settings["n_mels"], settings["f_min"], settings["f_max"], self.n_fft, sample_rate
        )

    def __call__(self, x):
        """x (N,) -> (N // hop + 1, n_mels) float32, dB."""
        x = np.pad(np.asarray(x, dtype=np.float64), self.n_fft // 2)
        frames = np.lib.stride_tricks.sliding_window_view(x, self.n_fft)[:: self.hop]
        # Some seconds at a time: a transform of all would take 50 times the sound's memory.
        pieces = [self._decibels(frames[i : i + 500]) for i in range(0, len(frames), 500)]
        decibels = np.concatenate(pieces)
        if self.top_db is not None:
            decibels = np.maximum(decibels, decibels.max() - self.top_db)
        return decibels.astype(np.float32)

    def _decibels(self, frames):
        spectrum = np.fft.rfft(frames * self.window)
        power = spectrum.real**2 + spectrum.imag**2
        return 10 * np.log10(np.maximum(power @ self.filters, self.amin))


def mel_filters(n_mels, f_min, f_max, n_fft, sample_rate):
    """Triangles, each from its neighbours' centres (SpeechBrain's `Filterbank`): (n_fft/2+1, M)."""

    def mel(hz):
        return 2595 * np.log10(1 + hz / 700)

    hz = 700 * (10 ** (np.linspace(mel(f_min), mel(f_max), n_mels + 2) / 2595) - 1)
    centre, band = hz[1:-1], np.diff(hz)[:-1]
    frequency = np.linspace(0, sample_rate // 2, n_fft // 2 + 1)
    slope = (frequency[:, None] - centre) / band
    return np.maximum(0, np.minimum(1 + slope, 1 - slope))
