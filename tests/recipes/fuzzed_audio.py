"""Reads damaged recordings until one does what it must not; for a process with limits of its own.

python -m tests.recipes.fuzzed_audio EXAMPLES [random]
"""

import resource
import sys
import tempfile
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import soundfile as sf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from inference.audio import open_audio, read
from modules.errors import UserError

RATE = 16000
MEMORY = 512 << 20  # bytes more than the libraries take
LONGEST = 120  # s of sound that a file of some kB may turn into before it is left
SOUND = 0.2 * np.random.default_rng(0).standard_normal(RATE // 4)
KINDS = {
    "wav": {},
    "flac": {},
    "mp3": {},
    "ogg": {"format": "OGG", "subtype": "VORBIS"},
    "opus": {"format": "OGG", "subtype": "OPUS"},
    "aiff": {},
    "au": {},
    "caf": {},
    "w64": {},
}
CODECS = {"m4a": ("aac", 1024), "webm": ("libopus", 960), "mkv": ("flac", 4096)}


def packed(path, codec, size):
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=48000, layout="mono")
        x = (np.repeat(SOUND, 3)[None] * 30000).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(x, format="s16", layout="mono")
        frame.rate, frame.pts, frame.time_base = 48000, 0, Fraction(1, 48000)
        form = stream.codec_context.format.name
        resampler = av.AudioResampler(format=form, layout="mono", rate=48000, frame_size=size)
        for part in [*resampler.resample(frame), *resampler.resample(None), None]:
            container.mux(stream.encode(part))


def whole_files(folder):
    """A short recording of each kind: {suffix: bytes}."""
    for suffix, options in KINDS.items():
        sf.write(folder / f"a.{suffix}", SOUND, RATE, **options)
    for suffix, codec in CODECS.items():
        packed(folder / f"a.{suffix}", *codec)
    return {path.suffix: path.read_bytes() for path in sorted(folder.iterdir())}


def damage(suffixes):
    """(suffix, bytes to change, leave out or put in, new end or None), mostly in the headers."""
    place = st.one_of(st.integers(0, 64), st.integers(0, 600), st.integers(0, 1 << 16))
    numbers = st.sampled_from(
        [0, 1, 0x7F, 0x80, 0xFF, 1 << 24, 1 << 31, (1 << 31) - 1, (1 << 32) - 1]
    )
    orders = st.sampled_from(["big", "little"])
    number = st.builds(lambda n, order: n.to_bytes(4, order), numbers, orders)
    change = st.tuples(place, st.binary(min_size=1, max_size=8) | number, st.booleans())
    return st.tuples(st.sampled_from(suffixes), st.lists(change, max_size=4), st.none() | place)


def damaged(data, changes, end):
    data = bytearray(data)
    for place, new, insert in changes:
        place %= len(data)
        data[place : place + (0 if insert else len(new))] = new
    return bytes(data[:end])


def hear(path):
    """Read a file as transcribing does; UserError is what may come of it."""
    try:
        heard = 0
        for block in read(open_audio(path), RATE):
            heard += len(block)
            if heard > LONGEST * RATE:
                return
    except UserError as error:
        assert str(error)


def limit_memory():
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))


def main(examples, random):
    av.logging.set_level(av.logging.PANIC)
    with tempfile.TemporaryDirectory() as folder:
        files = whole_files(Path(folder))
        for suffix in files:
            hear(Path(folder) / f"a{suffix}")
        limit_memory()

        @settings(
            max_examples=examples,
            deadline=5000,  # ms: longer is a hang
            derandomize=not random,
            database=None,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        )
        @given(damage(sorted(files)))
        def fuzz(file):
            suffix, changes, end = file
            path = Path(folder) / f"fuzzed{suffix}"
            path.write_bytes(damaged(files[suffix], changes, end))
            hear(path)

        fuzz()


if __name__ == "__main__":
    main(int(sys.argv[1]), "random" in sys.argv)
