"""What is written is what the formats say."""

import json

import pytest

from inference.formats import FORMATS, clock
from inference.transcript import PAUSE, WIDEST, Word, transcript_of

WORDS = [
    Word("R&B", 0.0, 0.5, 0.75),
    Word("IS", 0.6, 0.9, 0.5),
    Word("FUN", 0.9 + PAUSE, 3661.9996, 1.0),
]
TRANSCRIPT = transcript_of(WORDS, 3662.0)


def shown(form, words=False):
    return FORMATS[form](TRANSCRIPT, words, "a.wav")


def test_segments_and_words():
    assert shown("txt") == "R&B IS FUN\n"
    assert shown("srt") == (
        "1\n00:00:00,000 --> 00:00:00,900\nR&B IS\n\n2\n00:00:01,700 --> 01:01:02,000\nFUN\n"
    )
    assert shown("vtt") == (
        "WEBVTT\n\n00:00:00.000 --> 00:00:00.900\nR&amp;B IS\n\n"
        "00:00:01.700 --> 01:01:02.000\nFUN\n"
    )
    assert shown("tsv") == "start\tend\ttext\n0.000\t0.900\tR&B IS\n1.700\t3662.000\tFUN\n"
    assert shown("tsv", True).splitlines()[:2] == [
        "start\tend\tconfidence\ttext",
        "0.000\t0.500\t0.750\tR&B",
    ]
    assert shown("srt", True).count("-->") == shown("vtt", True).count("-->") == 3


def test_json():
    assert shown("json").count("\n") == 1
    found = json.loads(shown("json", True))
    assert found["file"] == "a.wav" and found["duration"] == 3662.0
    assert found["words"][0] == {"text": "R&B", "start": 0.0, "end": 0.5, "confidence": 0.75}
    assert [s["text"] for s in found["segments"]] == ["R&B IS", "FUN"]
    assert "words" not in json.loads(shown("json"))


def test_nothing_heard():
    empty = transcript_of([], 1.0)
    assert empty.text == "" and empty.segments == ()
    assert [FORMATS[f](empty, False, "a") for f in ("txt", "srt", "vtt", "tsv")] == [
        "\n",
        "",
        "WEBVTT\n",
        "start\tend\ttext\n",
    ]


def test_long_speech_is_cut_at_its_longest_pauses():
    words, time = [], 0.0
    for i in range(60):
        time += 0.5 if i % 10 == 0 else 0.1
        words.append(Word("SIXTEEN", time, time + 0.2, 1.0))
        time += 0.2
    transcript = transcript_of(words, time)
    assert " ".join(s.text for s in transcript.segments) == transcript.text
    assert [len(s.text.split()) for s in transcript.segments] == [10] * 6
    assert all(len(s.text) <= WIDEST for s in transcript.segments)
    cue = FORMATS["srt"](transcript, False, "a").split("\n\n")[0].splitlines()[2:]
    assert len(cue) == 2 and all(len(line) <= 42 for line in cue)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "00:00:00,000"), (59.9996, "00:01:00,000"), (36000.25, "10:00:00,250")],
)
def test_clock(seconds, text):
    assert clock(seconds, ",") == text
