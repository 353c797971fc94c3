"""eSpeak NG through ctypes: voices, and text to samples. Not thread-safe: one a process."""

import ctypes
import functools

import numpy as np

from modules.errors import UserError

SYNCHRONOUS = 2
DONT_EXIT = 0x8000  # return an error code where eSpeak would end the process
RATE, PITCH, RANGE, GAP = 1, 3, 4, 7  # espeak_PARAMETER
CHARACTER_POSITION = 1
UTF8 = 1
PHONEMES = 0x100  # what stands in [[ ]] is phonemes
SEPARATOR = "|"  # between phonemes, in what eSpeak gives and takes


class _Voice(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("languages", ctypes.c_char_p),
        ("identifier", ctypes.c_char_p),
        ("gender", ctypes.c_ubyte),
        ("age", ctypes.c_ubyte),
        ("variant", ctypes.c_ubyte),
        ("reserved", ctypes.c_ubyte),
        ("score", ctypes.c_int),
        ("spare", ctypes.c_void_p),
    )


_Callback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)


@functools.cache
def start():
    """The eSpeak of this process; it has one voice and one callback, whoever asks."""
    return Espeak()


class Espeak:
    """The library, started. `sample_rate` is what it gives, in Hz (22050)."""

    def __init__(self):
        self._lib, self.sample_rate = _load()
        self._chunks = []
        self._callback = _Callback(self._collect)  # kept: C holds only the bare pointer
        self._lib.espeak_SetSynthCallback(self._callback)

    def accents(self):
        """Names of the English voices, such as en-us; the list has some that cannot be set."""
        listed = {"en"} | {tag for tag, _ in self._voices(b"en") if tag != "variant"}
        return {tag for tag in listed if self._lib.espeak_SetVoiceByName(tag.encode()) == 0}

    @functools.cached_property
    def variants(self):
        """Names of the voice variants, such as f1: what may stand behind the `+`."""
        return {file.rsplit("/", 1)[-1] for _, file in self._voices(b"variant")}

    def _voices(self, language):
        wanted = _Voice(languages=language)
        for voice in _until_null(self._lib.espeak_ListVoices(ctypes.byref(wanted))):
            # The list of languages starts with a byte of priority.
            yield voice.languages[1:].decode(), voice.identifier.decode()

    def set_voice(self, accent, variant, rate, pitch, pitch_range, gap=0):
        """Choose accent and variant.

        rate in words a minute; pitch and range 0 to 100; gap between words in 10 ms.
        """
        name = f"{accent}+{variant}" if variant else accent
        # eSpeak refuses an unknown accent, but takes an unknown variant for none at all.
        if variant and variant not in self.variants:
            raise UserError(
                f"voice variant {variant!r} is unknown to eSpeak; choose one of "
                f"{', '.join(sorted(self.variants))}"
            )
        if self._lib.espeak_SetVoiceByName(name.encode()) != 0:
            raise UserError(
                f"voice {name!r} is unknown to eSpeak; choose an accent of "
                f"{', '.join(sorted(self.accents()))}"
            )
        self.set_style(rate, pitch, pitch_range, gap)

    def set_style(self, rate, pitch, pitch_range, gap=0):
        """Change these of the voice that is set; much faster than `set_voice`."""
        style = {RATE: rate, PITCH: pitch, RANGE: pitch_range, GAP: gap}
        for parameter, value in style.items():
            self._check(self._lib.espeak_SetParameter(parameter, value, 0), f"value {value}")

    def phonemes(self, text):
        """eSpeak's phonemes of a text: clauses of words, both lists, of strings such as `k|'a|t`.

        SEPARATOR stands between the phonemes of a word, stress before its vowel.
        """
        data = ctypes.c_char_p(text.encode())
        mode, clauses = ord(SEPARATOR) << 8, []
        while data.value is not None:
            clause = self._lib.espeak_TextToPhonemes(ctypes.byref(data), UTF8, mode)
            clauses.append(clause.decode().split())
        return clauses

    def say(self, text):
        """`text`, with phonemes in [[ ]] if you like -> samples in [-1, 1] (n,), float32."""
        self._chunks.clear()
        data = text.encode()
        code = self._lib.espeak_Synth(
            data, len(data) + 1, 0, CHARACTER_POSITION, 0, UTF8 | PHONEMES, None, None
        )
        self._check(code, repr(text))
        if not self._chunks:
            raise RuntimeError(f"eSpeak gave no audio for {text!r}")
        return np.concatenate(self._chunks).astype(np.float32) / 32768

    def _collect(self, samples, count, _events):
        if samples and count > 0:
            self._chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    @staticmethod
    def _check(code, what):
        if code != 0:
            raise RuntimeError(f"eSpeak refused {what} with code {code}")


def _until_null(pointers):
    for pointer in pointers:
        if not pointer:
            return
        yield pointer.contents


def _load():
    """Load and start the library, with the types of the functions used here."""
    try:
        import espeakng_loader
    except ImportError as error:
        raise UserError(
            "the demo corpus is spoken by eSpeak NG, and the package espeakng-loader is not "
            "installed; run: pip install -r requirements-demo.txt"
        ) from error
    lib = ctypes.CDLL(espeakng_loader.get_library_path())
    lib.espeak_ListVoices.argtypes = [ctypes.POINTER(_Voice)]
    lib.espeak_ListVoices.restype = ctypes.POINTER(ctypes.POINTER(_Voice))
    lib.espeak_SetSynthCallback.argtypes = [_Callback]
    lib.espeak_SetSynthCallback.restype = None
    lib.espeak_SetVoiceByName.argtypes = [ctypes.c_char_p]
    lib.espeak_Synth.argtypes = [
        ctypes.c_char_p,
        ctypes.c_size_t,
        ctypes.c_uint,
        ctypes.c_int,
        ctypes.c_uint,
        ctypes.c_uint,
        ctypes.c_void_p,
        ctypes.c_void_p,
    ]
    lib.espeak_TextToPhonemes.argtypes = [
        ctypes.POINTER(ctypes.c_char_p),
        ctypes.c_int,
        ctypes.c_int,
    ]
    lib.espeak_TextToPhonemes.restype = ctypes.c_char_p
    data = espeakng_loader.get_data_path()
    sample_rate = lib.espeak_Initialize(SYNCHRONOUS, 0, data.encode(), DONT_EXIT)
    if sample_rate <= 0:
        raise UserError(
            f"eSpeak NG could not start with its data in {data}; install it again: "
            f"pip install --force-reinstall -r requirements-demo.txt"
        )
    return lib, sample_rate
