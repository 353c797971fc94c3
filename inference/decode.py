"""Audio files -> blocks of mono samples: soundfile reads most kinds, PyAV the others.

A file that ends before its sound does is an error, not a shorter recording.
"""

import os
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import soundfile as sf

from modules.cut_off import cut_off
from modules.errors import UserError

SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".aiff", ".aif", ".au", ".caf", ".w64")
RATES = range(1000, 1_000_001)  # Hz; a header may say anything
CHANNELS = 64
BLOCK = 1 << 20  # samples of all channels that are decoded at a time
UNKNOWN = 1 << 62  # so many samples say that libsndfile does not know
# What states its length, and not a guess from the bit rate.
TIMED = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")
TOLERANCE = 0.5  # s: codecs add silence, and take it away
# FFmpeg's containers of one file. Playlists are not among them: they open other files.
CONTAINERS = (
    "aac,ac3,aiff,amr,ape,asf,au,avi,caf,dsf,dts,eac3,flac,flv,matroska,mov,mp3,mpeg,mpegts,ogg,"
    "tak,tta,voc,w64,wav,wv"
)
OPTIONS = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
PYAV_SUFFIXES = (".m4a", ".mp4", ".webm", ".aac", ".mkv", ".mka", ".mov", ".wma", ".amr", ".3gp")


def open_file(path):
    """An audio file -> its rate, Hz, its length in seconds or None, a function that reads it.

    That function yields arrays (N,) float32, the mean over channels, in bounded memory.
    UserError for what is no audio, here or while reading.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    if not path.stat().st_size:
        raise UserError(f"{path} is empty, 0 bytes; give a recording")
    try:
        with opened(path) as file:
            check_form(path, file.samplerate, file.channels)
            rate, frames = file.samplerate, file.frames
        why = cut_off(path, frames)
        if why is None:
            seconds = None if frames >= UNKNOWN else frames / rate
            return rate, seconds, lambda: soundfile_blocks(path)
        if not why.startswith("only"):  # which is libsndfile's limit, not the file's
            raise UserError(ends_early(path, why))
        reason = why
    except (sf.LibsndfileError, OSError, TypeError) as error:  # TypeError: raw data without header
        reason = reason_of(error)
        if why := cut_off(path):
            raise UserError(ends_early(path, why)) from None
    if find_spec("av") is None:
        raise UserError(
            f"{path} is no audio that soundfile reads ({reason}); give wav, flac, mp3, ogg or "
            "opus, or `pip install av` for m4a, mp4, webm and other kinds"
        )
    return open_container(path)


def opened(path):
    """By soundfile, which encodes a str strictly: a name on Linux is bytes, of any encoding."""
    return sf.SoundFile(str(path) if os.name == "nt" else os.fsencode(path))


def check_form(path, rate, channels):
    """UserError for what would take memory without end."""
    if rate not in RATES or not 0 < channels <= CHANNELS:
        raise UserError(
            f"{path} has {rate} samples a second and {channels} channels; give {RATES[0]} to "
            f"{RATES[-1]} Hz and at most {CHANNELS} channels"
        )


def ends_early(path, why):
    return (
        f"{path} is cut off: {why}; copy it again, or convert what there is of it to another file "
        "to transcribe that"
    )


def soundfile_blocks(path):
    try:
        with opened(path) as file:
            size, left = min(file.samplerate, BLOCK // file.channels), file.frames
            while len(block := file.read(size, dtype="float32", always_2d=True)):
                left -= len(block)
                yield block.mean(axis=1)
            if left > 0 and file.frames < UNKNOWN:
                raise UserError(ends_early(path, f"{left} of {file.frames} samples are missing"))
    except (sf.LibsndfileError, OSError) as error:
        reason = reason_of(error)
        raise UserError(f"{path} is damaged ({reason}); record or convert it again") from None


def open_container(path):
    """`open_file` by PyAV: the first audio stream."""
    import av

    try:
        with av.open(str(path), options=OPTIONS) as container:
            if not container.streams.audio:
                raise UserError(f"{path} holds no audio stream; give a recording")
            stream = container.streams.audio[0]
            # PyAV has no codec for what it does not know.
            rate = stream.codec_context and stream.rate
            if not rate:
                raise UserError(
                    f"{path} tells no sample rate, or is of an unknown kind; convert it to wav"
                )
            check_form(path, rate, stream.channels)
            seconds = stated_seconds(container, stream)
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise UserError(
            f"{path} is no audio that soundfile or PyAV reads ({reason_of(error)}); give wav, "
            "flac, mp3, ogg, opus, m4a, mp4 or webm"
        ) from None
    return rate, seconds, lambda: container_blocks(path, rate, seconds)


def stated_seconds(container, stream):
    """How long a container says that its sound is, or None where that is a guess."""
    import av

    if container.format.name not in TIMED:
        return None
    if stream.duration:
        return float(stream.duration * stream.time_base)
    if len(container.streams) > 1 or not container.duration:  # pictures may last longer
        return None
    return container.duration / av.time_base


def container_blocks(path, rate, seconds):
    import av

    decoded = reached = 0.0  # s: of pauses that are not stored only the time remains
    try:
        with av.open(str(path), options=OPTIONS) as container:
            # One rate and number type; the channels stay as they are.
            resampler = av.AudioResampler(format="fltp", rate=rate)
            held = []
            stream = container.streams.audio[0]
            start = float((stream.start_time or 0) * stream.time_base)
            for frame in container.decode(stream):
                reached = max(reached, (frame.time or 0) - start + frame.samples / frame.rate)
                held += map(mono, resampler.resample(frame))
                if sum(map(len, held)) >= rate:
                    block, held = np.concatenate(held), []
                    decoded += len(block) / rate
                    if seconds is not None and decoded > seconds + TOLERANCE:
                        raise UserError(f"{path} says {seconds:.2f} s and is longer; convert it")
                    yield block
            held += map(mono, resampler.resample(None))
            if held:
                yield np.concatenate(held)
        if seconds is not None and reached < seconds - TOLERANCE:
            raise UserError(ends_early(path, f"it says {seconds:.2f} s and has {reached:.2f} s"))
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({reason_of(error)}); convert it again") from None


def mono(frame):
    """One channel a row -> their mean (N,)."""
    return frame.to_ndarray().astype(np.float32).mean(axis=0)


def reason_of(error):
    reason = getattr(error, "error_string", None)  # of libsndfile, without the path
    lines = str(reason or getattr(error, "strerror", None) or error).splitlines()
    return lines[0] if lines else type(error).__name__
