"""Is this audio file usable? Header and last block are read, not the whole file."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import soundfile as sf

from modules.corpus.report import (
    EMPTY_AUDIO,
    NO_AUDIO,
    NOT_MONO,
    TOO_LONG,
    TOO_SHORT,
    UNREADABLE,
    WRONG_RATE,
    Fault,
)


def check_audio(path, sample_rate, min_seconds, max_seconds):
    """`path` -> (seconds, None) if usable, else (None, Fault).

    The last sample is decoded too: a download that broke off keeps a faultless header.
    """
    if not os.path.exists(path):
        return None, Fault(NO_AUDIO, path, "no such file")
    try:
        with sf.SoundFile(path) as audio:
            frames, rate, channels = audio.frames, audio.samplerate, audio.channels
            truncated = frames > 0 and _misses_its_end(audio)
    except (sf.LibsndfileError, OSError) as error:
        return None, Fault(UNREADABLE, path, str(error).splitlines()[0])
    if frames == 0:
        return None, Fault(EMPTY_AUDIO, path)
    if truncated:
        return None, Fault(UNREADABLE, path, f"breaks off before its {frames} samples are over")
    found = f"{rate} Hz, {channels} channel(s)"
    if rate != sample_rate:
        return None, Fault(WRONG_RATE, path, f"{found}; expected {sample_rate} Hz")
    if channels != 1:
        return None, Fault(NOT_MONO, path, f"{found}; expected 1")
    seconds = frames / rate
    if seconds < min_seconds:
        return None, Fault(TOO_SHORT, path, f"{seconds:.3f} s, min_seconds={min_seconds}")
    if max_seconds is not None and seconds > max_seconds:
        return None, Fault(TOO_LONG, path, f"{seconds:.1f} s, max_seconds={max_seconds}")
    return seconds, None


def _misses_its_end(audio):
    audio.seek(audio.frames - 1)
    return len(audio.read(1)) != 1


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
