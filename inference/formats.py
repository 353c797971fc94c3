"""A transcript as text: plain, JSON, subtitles (SRT, WebVTT) or a table (TSV)."""

import html
import json
import textwrap
from dataclasses import asdict

LINE = 42  # characters of a subtitle's line


def txt(transcript, words, name):
    return transcript.text + "\n"


def as_json(transcript, words, name):
    """One object on one line; `words` when word times are asked for."""
    fields = {
        "file": name,
        "text": transcript.text,
        "duration": round(transcript.duration, 3),
        "segments": [rounded(s) for s in transcript.segments],
    }
    if words:
        fields["words"] = [rounded(w) for w in transcript.words]
    return json.dumps(fields, ensure_ascii=False) + "\n"


def srt(transcript, words, name):
    cues = enumerate(cues_of(transcript, words), start=1)
    return "\n".join(f"{i}\n{cue(c, ',', lines(c.text))}" for i, c in cues)


def vtt(transcript, words, name):
    cues = cues_of(transcript, words)
    shown = [cue(c, ".", html.escape(lines(c.text), quote=False)) for c in cues]
    return "\n".join(["WEBVTT\n", *shown])


def tsv(transcript, words, name):
    """Seconds and text, a row a segment or a word; words with their confidence."""
    rows = ["start\tend\tconfidence\ttext" if words else "start\tend\ttext"]
    for c in cues_of(transcript, words):
        confidence = f"{c.confidence:.3f}\t" if words else ""
        rows.append(f"{c.start:.3f}\t{c.end:.3f}\t{confidence}{c.text}")
    return "\n".join(rows) + "\n"


# Functions of a transcript, whether word by word, and the recording's name.
FORMATS = {"txt": txt, "json": as_json, "srt": srt, "vtt": vtt, "tsv": tsv}


def cues_of(transcript, words):
    return transcript.words if words else transcript.segments


def rounded(item):
    """A segment or word as plain data, in milliseconds and thousandths."""
    return {k: round(v, 3) if isinstance(v, float) else v for k, v in asdict(item).items()}


def lines(text):
    return "\n".join(textwrap.wrap(text, LINE, break_long_words=False, break_on_hyphens=False))


def cue(item, point, text):
    return f"{clock(item.start, point)} --> {clock(item.end, point)}\n{text}\n"


def clock(seconds, point):
    """0.5 -> 00:00:00.500, with `point` before the milliseconds."""
    whole, thousandths = divmod(round(seconds * 1000), 1000)
    minutes, whole = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02d}:{minutes:02d}:{whole:02d}{point}{thousandths:03d}"
