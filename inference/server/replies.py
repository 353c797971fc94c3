"""A transcript as the OpenAI API gives it: json, text, verbose_json, srt, vtt."""

import math
import zlib
from dataclasses import dataclass

from starlette.responses import JSONResponse, PlainTextResponse

from inference.formats import FORMATS, rounded
from inference.server.limits import RefusedError

MEDIA = {"text": "text/plain", "srt": "application/x-subrip", "vtt": "text/vtt"}
REPLIES = ("json", "text", "verbose_json", "srt", "vtt")
GRANULARITIES = {"segment", "word"}
STREAM = {"true": True, "1": True, "false": False, "0": False}


@dataclass(frozen=True)
class Wanted:
    """How a client wants its transcript."""

    form: str
    granularities: frozenset
    language: str
    stream: bool


def wanted(fields):
    """Form fields, (name, value) pairs -> Wanted; RefusedError for what is not served.

    The fields model, language, prompt and temperature are taken and change nothing.
    """
    values = dict(fields)
    form = values.get("response_format", "json")
    if form not in REPLIES:
        raise RefusedError(
            400, f"response_format={form!r} is unknown; give one of {', '.join(REPLIES)}"
        )
    stream = STREAM.get(values.get("stream", "false").lower())
    if stream is None:
        raise RefusedError(400, f"stream={values['stream']!r} is neither true nor false")
    if stream and form not in ("json", "verbose_json"):
        raise RefusedError(
            400,
            f"stream=true: {form} comes in one piece; give json or verbose_json",
        )
    names = ("timestamp_granularities[]", "timestamp_granularities")
    asked = frozenset(value for name, value in fields if name in names)
    if asked - GRANULARITIES:
        raise RefusedError(
            400, f"timestamp_granularities={', '.join(sorted(asked))}; give word, segment or both"
        )
    if asked and form in ("json", "text"):
        raise RefusedError(
            400, f"timestamp_granularities: {form} has no times; give response_format=verbose_json"
        )
    language = values.get("language") or "unknown"
    return Wanted(form, asked or frozenset({"segment"}), language, stream)


def reply(transcript, wanted):
    """Transcript -> an HTTP response."""
    if wanted.form in ("json", "verbose_json"):
        return JSONResponse(answer(transcript, wanted))
    by_word = wanted.granularities == {"word"}
    write = FORMATS["txt" if wanted.form == "text" else wanted.form]
    return PlainTextResponse(write(transcript, by_word, ""), media_type=MEDIA[wanted.form])


def answer(transcript, wanted):
    """json or verbose_json, as plain data."""
    if wanted.form == "json":
        return {"text": transcript.text, "usage": usage(transcript)}
    return verbose(transcript, wanted)


def verbose(transcript, wanted):
    fields = {
        "task": "transcribe",
        "language": wanted.language,
        "duration": round(transcript.duration, 3),
        "text": transcript.text,
        "usage": usage(transcript),
    }
    if "segment" in wanted.granularities:
        fields["segments"] = segments(transcript)
    if "word" in wanted.granularities:
        fields["words"] = words_of(transcript.words)
    return fields


def words_of(words):
    """Words with the API's name of their text."""
    return [{"word": w.pop("text"), **w} for w in map(rounded, words)]


def segments(transcript):
    """Segments with the fields that the API's clients want.

    avg_logprob is the mean logarithm of the confidences of a segment's words. tokens,
    temperature and no_speech_prob stand for nothing here.
    """
    found, first = [], 0
    for i, segment in enumerate(transcript.segments):
        count = len(segment.text.split())
        words = transcript.words[first : first + count]
        first += count
        logs = [math.log(max(w.confidence, 1e-4)) for w in words]
        text = segment.text.encode()
        found.append(
            {
                "id": i,
                "seek": 0,
                **rounded(segment),
                "tokens": [],
                "temperature": 0.0,
                "avg_logprob": round(sum(logs) / len(logs), 3),
                "compression_ratio": round(len(text) / len(zlib.compress(text)), 3),
                "no_speech_prob": 0.0,
            }
        )
    return found


def usage(transcript):
    return {"type": "duration", "seconds": math.ceil(transcript.duration)}
