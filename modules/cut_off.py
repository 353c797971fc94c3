"""Is an audio file cut off? The lengths that its container states, against the bytes that it has.

libsndfile takes what is there of a wav, ogg or mp3 file for the whole of it.
"""

import mmap
import os
import struct
from dataclasses import dataclass

WRITTEN_TO_A_PIPE = 0x7FFFF000  # sizes from here on stand for "not known yet"
MOST_CHUNKS = 1000  # before the samples: more is no recording
OGG_PAGE = 65307  # bytes at most
MP3_PADDING = 5000  # samples that an encoder adds, and decoders take away


@dataclass(frozen=True)
class Chunks:
    """How a format names its chunks: the file header's bytes, the name's, the format of the size,
    whether that counts the chunk's own header, what chunks are padded to, the samples' name."""

    start: int
    name: int
    size: str
    whole: bool
    align: int
    samples: bytes


CHUNKS = {
    b"RIFF": Chunks(12, 4, "<I", False, 2, b"data"),
    b"RF64": Chunks(12, 4, "<I", False, 2, b"data"),
    b"FORM": Chunks(12, 4, ">I", False, 2, b"SSND"),
    b"caff": Chunks(8, 4, ">q", False, 1, b"data"),
    b"riff": Chunks(40, 16, "<Q", True, 8, bytes.fromhex("64617461f3acd3118cd100c04f8edb8a")),
}


def cut_off(path, frames=None, streamed=True):
    """Why a file's sound is not all there, or None: it is whole, or its format cannot tell.

    frames: how many libsndfile finds, which stops early in mp3 files of variable bit rate that do
    not tell their length.
    streamed: whether a file may leave its length open, as what was written to a pipe does.
    """
    size = os.path.getsize(path)
    if not size:
        return "it is empty"
    with open(path, "rb") as file:
        start = file.read(12)
        if start[:4] in CHUNKS:
            stated = samples_bytes(file, CHUNKS[start[:4]], size)
        elif start[:4] == b".snd":
            offset, length = struct.unpack(">II", start[4:12].ljust(8, b"\0"))
            stated = offset, length
        elif start[:4] == b"OggS":
            return ogg_cut_off(file, size)
        else:
            return mp3_cut_off(path, frames)
    if stated is None:
        return None
    begin, length = stated
    if length >= WRITTEN_TO_A_PIPE and length > size:
        return None if streamed else "its header leaves its length open, so a cut would not show"
    missing = begin + length - size
    return f"{missing} of {length} bytes of sound are missing" if missing > 0 else None


def samples_bytes(file, chunks, size):
    """Where the samples begin and how many bytes the header says they are; None: no such chunk."""
    position, long_size = chunks.start, None
    header = chunks.name + struct.calcsize(chunks.size)
    for _ in range(MOST_CHUNKS):
        if position + header > size:
            break
        file.seek(position)
        name = file.read(chunks.name)
        (length,) = struct.unpack(chunks.size, file.read(header - chunks.name))
        if chunks.whole:
            length -= header
        if name == chunks.samples:
            if length < 0 or (long_size is not None and length == 0xFFFFFFFF):
                length = WRITTEN_TO_A_PIPE + size if long_size is None else long_size
            return position + header, length
        if name == b"ds64":
            long_size = struct.unpack("<8xQ", file.read(16).ljust(16, b"\0"))[0]
        if length < 0:
            return None
        position += header + length + -length % chunks.align
    return None


def ogg_cut_off(file, size):
    """The last page must be whole, and say that it is the last of its stream."""
    file.seek(max(0, size - OGG_PAGE))
    end = file.read()
    page = end.rfind(b"OggS")
    if page < 0 or len(end) < page + 27:
        return "its last page is incomplete"
    lengths = end[page + 27 : page + 27 + end[page + 26]]
    if len(lengths) < end[page + 26] or len(end) < page + 27 + len(lengths) + sum(lengths):
        return "its last page is incomplete"
    return None if end[page + 5] & 4 else "it has no last page"


KBITS = {
    True: (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    False: (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
RATES = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}


def mp3_cut_off(path, found):
    """Walk through the frames of an mp3 file; other files have none."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        first = position = id3_size(data[:10])
        samples = 0
        while frame := frame_length(data[position : position + 4]):
            number, length = frame
            if position == first and (stated := stated_bytes(data[first : first + length])):
                missing = first + stated - len(data)
                if missing > 0:
                    return f"{missing} of {stated} bytes are missing"
            position, samples = position + length, samples + number
        rest = len(data) - position
    if samples and (rest < 0 or 0 < rest < 4):
        return "its last frame is incomplete"
    if found is not None and found + MP3_PADDING < samples:
        return f"only {found} of its {samples} samples can be read"
    return None


def id3_size(start):
    """The bytes of the tag that an mp3 file may begin with."""
    if start[:3] != b"ID3" or len(start) < 10:
        return 0
    return 10 + sum((b & 127) << shift for b, shift in zip(start[6:], (21, 14, 7, 0), strict=True))


def frame_length(header):
    """(samples, bytes) of the layer III frame that 4 bytes begin, or None where they begin none."""
    if len(header) < 4:
        return None
    bits = int.from_bytes(header, "big")
    version, layer, kbits, rate = (bits >> n & m for n, m in ((19, 3), (17, 3), (12, 15), (10, 3)))
    if bits >> 21 != 0x7FF or version == 1 or layer != 1 or kbits in (0, 15) or rate == 3:
        return None
    one = version == 3
    size = (144_000 if one else 72_000) * KBITS[one][kbits - 1] // RATES[version][rate]
    return (1152 if one else 576), size + (bits >> 9 & 1)


def stated_bytes(frame):
    """The length of the file that its first frame tells, if it is Xing's kind."""
    place = max(frame.find(b"Xing", 4, 60), frame.find(b"Info", 4, 60))
    if place < 0 or len(frame) < place + 16:
        return None
    flags = int.from_bytes(frame[place + 4 : place + 8], "big")
    offset = place + 8 + (4 if flags & 1 else 0)
    return int.from_bytes(frame[offset : offset + 4], "big") if flags & 2 else None
