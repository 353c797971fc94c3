"""Log-mel features: waveforms (B, N) -> (B, T, n_mels), an utterance's own whatever its batch."""

import torch
from speechbrain.lobes.features import Fbank
from torch import nn
from torch.nn import functional as F  # noqa: N812

from modules.errors import UserError
from modules.fourier import short_time
from modules.lengths import relative
from modules.ops import log_mel


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
    top_db : float or None
        Dynamic range, dB. None: unbounded, so that no frame depends on later ones and `advance`
        can read an utterance in pieces.
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
        # `forward` pads: a piece of an utterance has samples, not zeros, beside it.
        self.fbank.compute_STFT.center = False
        self.n_fft = n_fft
        self.constants = None  # `constants_on` the device where the waveforms were last

    def forward(self, wavs, lengths):
        """wavs (B, N), zero past lengths (B,) in samples -> (B, T, n_mels), lengths in frames.

        An utterance of N samples has N // hop + 1 frames.
        """
        lengths = torch.div(lengths, self.hop, rounding_mode="floor") + 1
        if log_mel.supports(wavs):
            return self.by_kernels(wavs, self.reach, lengths, self.top_db), lengths
        x = self.mels(F.pad(wavs, (self.reach, self.reach)))
        time = torch.arange(x.shape[1], device=x.device)
        padded = (time >= lengths.unsqueeze(1)).unsqueeze(2)
        if self.top_db is not None:
            loudest = x.masked_fill_(padded, float("-inf")).amax(dim=(1, 2), keepdim=True)
            x = torch.maximum(x, loudest - self.top_db)
        return x.masked_fill_(padded, 0.0), lengths

    def mels(self, wavs):
        """(B, N) -> (B, T, n_mels): SpeechBrain's `Fbank`, elsewhere than on a CPU shorter ways."""
        if log_mel.supports(wavs):
            return self.by_kernels(wavs)
        return self.fbank(wavs) if wavs.device.type == "cpu" else self.short_mels(wavs)

    def by_kernels(self, wavs, reach=0, lengths=None, top_db=None):
        """As `mels` of padded waveforms, then limited; each spectrum is written and read once."""
        window, _, bands = self.constants_on(wavs.device)
        amin = self.fbank.compute_fbanks.amin
        with torch.autocast(wavs.device.type, enabled=False):
            return log_mel.log_mel(
                *(wavs.float(), window, bands, self.hop),
                amin=amin,
                reach=reach,
                lengths=lengths,
                top_db=top_db,
            )

    def short_mels(self, wavs):
        """As `mels`, in half as many passes over the spectra, which are most of the bytes.

        And the host waits for nothing. For `Fbank` it does: to copy the constants to the device in
        each call, and for the transforms of a size that is new.
        """
        window, banks, _ = self.constants_on(wavs.device)
        with torch.autocast(wavs.device.type, enabled=False):
            spectra = short_time(wavs.float(), window, self.hop)
            power = torch.addcmul(spectra.real.square(), spectra.imag, spectra.imag)
            return 10 * torch.log10(torch.clamp(power @ banks, min=self.fbank.compute_fbanks.amin))

    def constants_on(self, device):
        """-> window, banks, banks as `log_mel.Bands`"""
        constants = self.constants  # another thread may replace them
        if constants is None or constants[0].device != device:
            window, banks = self.window(), self.banks()
            bands = log_mel.Bands(*(x.to(device) for x in log_mel.bands_of(banks)))
            constants = self.constants = window.to(device), banks.to(device), bands
        return constants

    def window(self):
        """The window in the middle of n_fft points."""
        window = self.fbank.compute_STFT.window
        left = (self.n_fft - len(window)) // 2
        return F.pad(window, (left, self.n_fft - len(window) - left))

    def banks(self):
        """The triangular filters (n_fft // 2 + 1, n_mels)."""
        banks = self.fbank.compute_fbanks
        width = banks.all_freqs_mat.shape[1]
        centres, bands = (x[:, None].expand(-1, width) for x in (banks.f_central, banks.band))
        return banks._create_fbank_matrix(centres, bands).contiguous()

    @property
    def reach(self):
        """Samples that a frame reads before and after its time."""
        return self.n_fft // 2

    def initial_state(self, batch_size):
        """Zero samples (B, reach) before the first; ValueError unless `top_db` is None."""
        if self.top_db is not None:
            raise ValueError(
                f"top_db={self.top_db} needs the loudest frame of all, which may be still to come; "
                "use top_db=None"
            )
        return self.fbank.compute_STFT.window.new_zeros(batch_size, self.reach)

    def advance(self, wavs, state, final=False):
        """The next samples of utterances: wavs (B, N), state -> frames (B, T, n_mels), state.

        Frames come once all samples that they read are there. final: the utterances end here.
        """
        x = torch.cat([state.to(wavs), wavs], dim=1)
        if final:
            x = F.pad(x, (0, self.reach))
        frames = max(0, (x.shape[1] - self.n_fft) // self.hop + 1)
        state = x[:, frames * self.hop :].clone()
        if not frames:
            n_mels = self.fbank.compute_fbanks.n_mels
            return x.new_zeros(len(x), 0, n_mels), state
        return self.mels(x[:, : (frames - 1) * self.hop + self.n_fft]), state


def standardize(normalize, x, lengths, epoch):
    """Features with SpeechBrain's `InputNormalization`, to the bit.

    It makes a mask of the padding even where it takes no statistics: a dozen launches.
    x (B, T, n_mels), lengths (B,) in frames, epoch: in some the statistics grow -> (B, T, n_mels)
    """
    known = normalize.norm_type == "global" and not normalize._should_update(epoch)
    if not (known and normalize.std_norm) or normalize.avoid_padding_norm:
        return normalize(x, relative(lengths, x.shape[1]), epoch)
    if not normalize.glob_mean.numel():
        raise UserError(
            "the model has no statistics of its features, which norm_type=global wants; give the "
            "--normalize options that it was trained with (hyperparams.yaml in its output folder)"
        )
    return (x - normalize.glob_mean) / normalize.glob_std.clamp(min=normalize.epsilon)
