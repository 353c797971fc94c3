"""Audio of any rate and channel count -> mono float32 at the model's rate."""

from pathlib import Path

import numpy as np
import soundfile as sf
import torch
from torchaudio.functional import resample

from modules.errors import UserError


def load_audio(audio, sample_rate, target_rate):
    """A path, or a 1-D array or tensor of `sample_rate` Hz -> samples (N,) float32 on the CPU.

    Channels of a file are averaged. Integers are scaled by their type's range.
    UserError for what cannot be read, is empty or not finite.
    """
    if isinstance(audio, str | Path):
        x, sample_rate, name = *read_file(audio), str(audio)
    else:
        x, name = from_array(audio, sample_rate), "the array"
    if not len(x):
        raise UserError(f"{name} holds no samples; give audio that is not empty")
    if not torch.isfinite(x).all():
        raise UserError(f"{name} holds samples that are not finite; give finite ones")
    return x if sample_rate == target_rate else resample(x, sample_rate, target_rate)


def read_file(path):
    """An audio file -> samples (N,) float32 and its rate, Hz."""
    try:
        samples, rate = sf.read(str(path), dtype="float32", always_2d=True)
    except (sf.LibsndfileError, OSError) as error:
        if not Path(path).is_file():
            raise UserError(f"there is no file {path}") from None
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{path} is no audio that soundfile reads ({reason}); give wav, flac, ogg or mp3"
        ) from None
    return torch.from_numpy(samples).mean(dim=1), rate


def from_array(audio, sample_rate):
    """A 1-D array or tensor -> (N,) float32."""
    if sample_rate is None or int(sample_rate) != sample_rate or sample_rate <= 0:
        raise UserError(
            f"sample_rate={sample_rate} is not the rate of an array in Hz; give sample_rate=16000, "
            "for instance"
        )
    x = audio.detach().cpu() if isinstance(audio, torch.Tensor) else as_tensor(audio)
    if x.dim() != 1:
        raise UserError(
            f"audio of shape {tuple(x.shape)} is not one channel of samples; give a 1-D array, the "
            "mean over channels for instance"
        )
    if x.dtype.is_floating_point:
        return x.float()
    if x.dtype not in (torch.int16, torch.int32):
        raise UserError(f"audio of {x.dtype} is unknown; give floats in [-1, 1], int16 or int32")
    return x.float() / (torch.iinfo(x.dtype).max + 1)


def as_tensor(audio):
    """A numpy array -> a tensor; UserError when it is no numbers."""
    if not isinstance(audio, np.ndarray):
        raise UserError(f"audio of type {type(audio).__name__} is unknown; give a path or an array")
    try:
        return torch.from_numpy(np.ascontiguousarray(audio))
    except TypeError as error:
        raise UserError(f"audio of {audio.dtype} is unknown ({error})") from None
