"""Live audio: a file at the speed of its sound, raw PCM, the microphone -> blocks as they come."""

import queue
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from inference.audio import open_audio, resampled
from modules.cut_off import frame_length
from modules.errors import UserError

PACKET = 0.05  # s of a file or the microphone at a time, and of what is resampled at once
# What is no raw PCM: its first bytes, of EBML those of webm and mkv.
CONTAINERS = (b"RIFF", b"RF64", b"FORM", b"fLaC", b"OggS", b"ID3", b"caff", b"\x1aE\xdf\xa3")
START = 1500  # bytes that tell a container: the longest mp3 frame has 1441, then the next begins


@dataclass(frozen=True)
class Source:
    """A stream of sound.

    rate : Hz
    blocks : a function of nothing; yields the samples as they come, (N,) float32
    """

    rate: int
    blocks: Callable[[], Iterator[torch.Tensor]]

    def at(self, rate):
        """Yield the samples at another rate, as they come."""
        return resampled(self.blocks(), self.rate, check_rate(rate), PACKET)


def check_rate(rate):
    if not 1000 <= rate <= 1_000_000:
        raise UserError(f"--rate {rate} is no rate of speech in Hz; give 16000, for instance")
    return rate


def file(path, fast=False):
    """A recording, at the speed of its sound unless `fast`."""
    recording = open_audio(path)
    check_rate(recording.rate)

    def packets():
        for block in recording.blocks():
            yield from block.split(int(PACKET * recording.rate))

    return Source(recording.rate, packets if fast else lambda: paced(packets(), recording.rate))


def paced(packets, rate):
    """Yield each packet when its last sample has sounded."""
    start, sent = time.monotonic(), 0
    for packet in packets:
        sent += len(packet)
        time.sleep(max(0.0, start + sent / rate - time.monotonic()))
        yield packet


def pcm(stream, rate):
    """Raw mono PCM, 16 bit little-endian, from an open binary file that gives what it has."""

    def blocks():
        data = b""
        while len(data) < START and (more := stream.read1(START - len(data))):
            data += more
        if contained(data):
            raise UserError("stdin is no raw PCM but a file; give its path instead of -")
        while data:
            even = len(data) // 2 * 2
            if even:
                whole = bytearray(data[:even])
                yield torch.frombuffer(whole, dtype=torch.int16).float() / 2**15
            more = stream.read1(8192)
            data = data[even:] + more if more else b""

    return Source(check_rate(rate), blocks)


def contained(start):
    """Whether a stream that starts so is an audio file."""
    if start.startswith(CONTAINERS) or start[4:8] == b"ftyp":
        return True
    # An mp3 frame's header alone may be samples; a second one of its kind where it ends is not.
    _, length = frame_length(start[:4]) or (0, 0)
    second = start[length : length + 4]
    return length > 0 and start[:2] == second[:2] and frame_length(second) is not None


def microphone(rate, device=None, warn=print):
    """The microphone, at `rate` Hz if it can, else at its own rate.

    device: number or part of the name of another input than the default; warn: called with a
    text when samples were lost.
    """
    sd = sounddevice()
    try:
        try:
            sd.check_input_settings(device=device, channels=1, dtype="float32", samplerate=rate)
        except sd.PortAudioError:
            rate = int(sd.query_devices(device, "input")["default_samplerate"])
            sd.check_input_settings(device=device, channels=1, dtype="float32", samplerate=rate)
    except (sd.PortAudioError, ValueError) as error:
        raise UserError(
            f"the microphone cannot be used ({error}); `python -m sounddevice` lists what there "
            "is, --input chooses"
        ) from None
    return Source(rate, lambda: recorded(sd, rate, device, warn))


def recorded(sd, rate, device, warn):
    """Yield what the microphone hears, for ever."""
    heard = queue.SimpleQueue()

    def callback(data, frames, when, status):
        heard.put((torch.from_numpy(data[:, 0].copy()), bool(status.input_overflow)))

    options = {"samplerate": rate, "blocksize": int(PACKET * rate), "dtype": "float32"}
    with sd.InputStream(device=device, channels=1, callback=callback, **options):
        while True:
            samples, lost = heard.get()
            if lost:
                warn("the microphone lost samples: this computer is too slow or too busy")
            yield samples


def sounddevice():
    """The optional package; UserError that tells how to install it."""
    try:
        import sounddevice
    except ImportError:
        raise UserError(
            "the microphone needs the package sounddevice; `pip install sounddevice`"
        ) from None
    except OSError:  # PortAudio itself; pip brings it on macOS and Windows alone
        raise UserError(
            "sounddevice does not find PortAudio; `apt-get install libportaudio2`, for instance"
        ) from None
    return sounddevice
