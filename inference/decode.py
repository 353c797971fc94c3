"""Audio files -> blocks of mono samples: soundfile reads most kinds, PyAV the others."""

from importlib.util import find_spec
from pathlib import Path

import soundfile as sf
import torch

from modules.errors import UserError

SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".aiff", ".aif", ".au", ".caf", ".w64")
# FFmpeg's containers of one file. Playlists are not among them: they open other files.
CONTAINERS = (
    "aac,ac3,aiff,amr,ape,asf,au,avi,caf,dsf,dts,eac3,flac,flv,matroska,mov,mp3,mpeg,mpegts,ogg,"
    "tak,tta,voc,w64,wav,wv"
)
OPTIONS = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
PYAV_SUFFIXES = (".m4a", ".mp4", ".webm", ".aac", ".mkv", ".mka", ".mov", ".wma", ".amr", ".3gp")


def open_file(path):
    """An audio file -> its rate, Hz, its length in seconds or None, a function that reads it.

    That function yields blocks (N,) float32, the mean over channels, in bounded memory.
    UserError for what is no audio, here or while reading.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    if not path.stat().st_size:
        raise UserError(f"{path} is empty, 0 bytes; give a recording")
    try:
        with sf.SoundFile(path) as file:
            rate, seconds = file.samplerate, file.frames / file.samplerate
        return rate, seconds, lambda: soundfile_blocks(path)
    except (sf.LibsndfileError, OSError, TypeError) as error:  # TypeError: raw data without header
        reason = str(error).splitlines()[0]
    if find_spec("av") is None:
        raise UserError(
            f"{path} is no audio that soundfile reads ({reason}); give wav, flac, mp3, ogg or "
            "opus, or `pip install av` for m4a, mp4, webm and other kinds"
        )
    return open_container(path)


def soundfile_blocks(path):
    try:
        with sf.SoundFile(path) as file:
            while len(block := file.read(file.samplerate, dtype="float32", always_2d=True)):
                yield torch.from_numpy(block).mean(dim=1)
    except (sf.LibsndfileError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} is damaged ({reason}); record or convert it again") from None


def open_container(path):
    """`open_file` by PyAV: the first audio stream."""
    import av

    try:
        with av.open(str(path), options=OPTIONS) as container:
            if not container.streams.audio:
                raise UserError(f"{path} holds no audio stream; give a recording")
            rate = container.streams.audio[0].rate
            if not rate:
                raise UserError(f"{path} does not tell its sample rate; convert it to wav")
            seconds = container.duration and container.duration / av.time_base
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise UserError(
            f"{path} is no audio that soundfile or PyAV reads ({reason_of(error)}); give wav, "
            "flac, mp3, ogg, opus, m4a, mp4 or webm"
        ) from None
    return rate, seconds, lambda: container_blocks(path, rate)


def container_blocks(path, rate):
    import av

    try:
        with av.open(str(path), options=OPTIONS) as container:
            # One rate and number type; the channels stay as they are.
            resampler = av.AudioResampler(format="fltp", rate=rate)
            held = []
            for frame in container.decode(container.streams.audio[0]):
                held += map(mono, resampler.resample(frame))
                if sum(map(len, held)) >= rate:
                    yield torch.cat(held)
                    held = []
            held += map(mono, resampler.resample(None))
            if held:
                yield torch.cat(held)
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({reason_of(error)}); convert it again") from None


def mono(frame):
    """One channel a row -> their mean (N,)."""
    return torch.from_numpy(frame.to_ndarray()).float().mean(dim=0)


def reason_of(error):
    return str(getattr(error, "strerror", None) or error).splitlines()[0]
