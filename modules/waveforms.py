"""The audio of an utterance, checked against its manifest, and batches of what can be used."""

import io
import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import soundfile as sf
import torch
from speechbrain.dataio.batch import PaddedBatch
from tqdm import tqdm

from modules.cut_off import cut_off

TOLERANCE = 0.05  # s that a manifest may be wrong by: people round
SAMPLE_BYTES = 4  # float32


@dataclass(frozen=True)
class Unread:
    """Stands for the audio of a file that cannot be used; `samples` were expected of it."""

    why: str
    samples: int


def read_audio(path, sample_rate, seconds):
    """The samples (N,) of a file, or Unread when it is not what the manifest says.

    A file may change after preparation: a disk fails, a copy breaks off. In place of a path there
    may be the file's bytes, or an Unread.
    """
    if isinstance(path, Unread):
        return Unread(path.why, math.ceil(seconds * sample_rate))
    in_memory = isinstance(path, bytes)
    try:
        if not in_memory and not os.path.isfile(path):
            raise FileNotFoundError("there is no such file")
        with sf.SoundFile(io.BytesIO(path) if in_memory else path) as audio:
            why = difference(path, audio, sample_rate, seconds)
            if why is None:
                x = audio.read(dtype="float32")
                if len(x) == audio.frames:
                    return torch.from_numpy(x)
                why = f"breaks off after {len(x)} of {audio.frames} samples"
    except (sf.LibsndfileError, OSError, TypeError) as error:  # TypeError: raw data, no header
        why = getattr(error, "error_string", str(error)) or "unreadable"
    name = "the file in the shard" if in_memory else path
    return Unread(f"{name}: {why}", math.ceil(seconds * sample_rate))


class KeptAudio:
    """Decoded files in memory, for as many as fit; the others are read anew each time.

    To be filled before worker processes are forked: they share the memory.

    Arguments
    ---------
    sample_rate : int
    megabytes : float
    """

    def __init__(self, sample_rate, megabytes):
        self.sample_rate, self.free = sample_rate, 1e6 * megabytes
        self.kept = {}

    def keep(self, files):
        """Read all files [(path, seconds)] in threads, if all of them fit; else nothing."""
        size = sum(seconds for _, seconds in files) * self.sample_rate * SAMPLE_BYTES
        if size > self.free:
            return
        self.free -= size
        with ThreadPoolExecutor() as pool:
            found = pool.map(lambda file: read_audio(file[0], self.sample_rate, file[1]), files)
            bar = tqdm(found, desc="audio into memory", total=len(files), disable=None, leave=False)
            for (path, _), samples in zip(files, bar, strict=True):
                if not isinstance(samples, Unread):  # which may be mended, and is named each time
                    self.kept[path] = samples

    def read(self, path, seconds):
        """As `read_audio`."""
        if self.kept and (samples := self.kept.get(path)) is not None:
            return samples.clone()  # the caller may write into it
        return read_audio(path, self.sample_rate, seconds)


def difference(path, audio, sample_rate, seconds):
    """How an open file differs from its manifest, or None."""
    if (audio.samplerate, audio.channels) != (sample_rate, 1):
        return f"{audio.samplerate} Hz, {audio.channels} channels; expected {sample_rate} Hz, mono"
    found = audio.frames / audio.samplerate
    if abs(found - seconds) > TOLERANCE:
        return f"lasts {found:.2f} s, and the manifest says {seconds:.2f} s"
    why = None if isinstance(path, bytes) else cut_off(path, audio.frames)
    return why and f"breaks off: {why}"


class Batch(PaddedBatch):
    """SpeechBrain's batch of the examples whose audio could be read.

    unread : [(id, why)] of the others. When there is nothing else, `lost` is True, and the first
    of them stays with NaN for its audio: processes that train together take equally many batches.
    """

    def __init__(self, examples):
        unread = [e for e in examples if isinstance(e["sig"], Unread)]
        read = [e for e in examples if not isinstance(e["sig"], Unread)]
        self.unread = [(e["id"], e["sig"].why) for e in unread]
        self.lost = not read
        if self.lost:
            read = [unread[0] | {"sig": torch.full((unread[0]["sig"].samples,), math.nan)}]
        super().__init__(read)
