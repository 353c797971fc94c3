"""Is this audio file usable? It is decoded from end to end, unless headers alone are wanted."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import soundfile as sf

from modules.corpus.report import (
    CLIPPED,
    EMPTY_AUDIO,
    NO_AUDIO,
    NOT_FINITE,
    NOT_MONO,
    SILENT,
    TOO_LONG,
    TOO_SHORT,
    UNREADABLE,
    WRONG_RATE,
    Fault,
)
from modules.cut_off import cut_off

BLOCK = 1 << 18  # samples that are decoded at a time
QUIET = 1e-3  # of full scale: nothing is louder in silence
FULL = 0.999  # of full scale: louder is clipped


def check_audio(path, sample_rate, min_seconds, max_seconds, max_clipped=1.0, headers_only=False):
    """`path` -> (seconds, None) if usable, else (None, Fault).

    A download that broke off keeps a faultless header: the end is looked at in any case.
    """
    if not os.path.isfile(path):
        return None, Fault(NO_AUDIO, path, "no such file")
    try:
        with sf.SoundFile(path) as audio:
            if fault := header_fault(path, audio, sample_rate, min_seconds, max_seconds):
                return None, fault
            seconds = audio.frames / audio.samplerate
            if headers_only:
                audio.seek(audio.frames - 1)
                kind, detail = (None, "") if len(audio.read(1)) == 1 else missing(audio.frames)
            else:
                kind, detail = sound_fault(audio, max_clipped)
    except (sf.LibsndfileError, OSError, TypeError) as error:  # TypeError: raw data, no header
        return None, Fault(UNREADABLE, path, (str(error).splitlines() or ["no reason given"])[0])
    return (None, Fault(kind, path, detail)) if kind else (seconds, None)


def header_fault(path, audio, sample_rate, min_seconds, max_seconds):
    """What is wrong with a file as far as its header tells, or None."""
    frames, rate, channels = audio.frames, audio.samplerate, audio.channels
    if frames == 0:
        return Fault(EMPTY_AUDIO, path)
    if why := cut_off(path, frames, streamed=False):
        return Fault(UNREADABLE, path, f"breaks off: {why}")
    found = f"{rate} Hz, {channels} channel(s)"
    if rate != sample_rate:
        return Fault(WRONG_RATE, path, f"{found}; expected {sample_rate} Hz")
    if channels != 1:
        return Fault(NOT_MONO, path, f"{found}; expected 1")
    seconds = frames / rate
    if seconds < min_seconds:
        return Fault(TOO_SHORT, path, f"{seconds:.3f} s, min_seconds={min_seconds}")
    if max_seconds is not None and seconds > max_seconds:
        return Fault(TOO_LONG, path, f"{seconds:.1f} s, max_seconds={max_seconds}")
    return None


def sound_fault(audio, max_clipped):
    """Decode a file of one channel: (kind of fault or None, detail)."""
    low, high, clipped, decoded = np.inf, -np.inf, 0, 0
    while len(x := audio.read(BLOCK, dtype="float32")):
        if not np.isfinite(x).all():
            first = decoded + int(np.argmin(np.isfinite(x)))
            return NOT_FINITE, f"{x[first - decoded]} at {first / audio.samplerate:.3f} s"
        decoded += len(x)
        low, high = min(low, x.min()), max(high, x.max())
        if high >= FULL or low <= -FULL:
            clipped += np.count_nonzero(np.abs(x) >= FULL)
    if decoded < audio.frames:
        return missing(audio.frames)
    if (high - low) / 2 < QUIET:
        return SILENT, f"nothing is louder than {(high - low) / 2:.1g} of full scale"
    if clipped > max_clipped * decoded:
        return CLIPPED, f"{100 * clipped / decoded:.1f} % of the samples are at full scale"
    return None, ""


def missing(frames):
    return UNREADABLE, f"breaks off before its {frames} samples are over"


def check_utterances(utterances, wanted, workers, progress, **limits):
    """Check the audio of utterances in order until `wanted` (None: all) are usable.

    Threads are enough: libsndfile runs without Python's lock.

    Returns (usable utterances with their durations, faults).
    """
    usable, faults = [], []
    position = 0
    with ThreadPoolExecutor(workers) as pool:
        while position < len(utterances) and (wanted is None or len(usable) < wanted):
            size = 4096 if wanted is None else min(4096, wanted - len(usable))
            batch = utterances[position : position + size]
            position += len(batch)
            for utterance, (seconds, fault) in zip(
                batch, pool.map(lambda u: check_audio(u.audio, **limits), batch), strict=True
            ):
                progress.update()
                if fault:
                    faults.append(fault)
                else:
                    usable.append(replace(utterance, duration=seconds))
    return usable, faults
