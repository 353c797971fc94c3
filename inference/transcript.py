"""What a recogniser returns."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Transcript:
    """The words of one recording.

    text : words, one space apart; "" when nothing was heard.
    duration : seconds of audio.
    """

    text: str
    duration: float
