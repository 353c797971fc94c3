"""Trained models at work: package a training's output, load it, transcribe."""

from inference.recognizer import Recognizer
from inference.streaming import StreamingRecognizer
from inference.transcript import Final, Partial, Result, Segment, Transcript, Word

__all__ = [
    "Final",
    "Partial",
    "Recognizer",
    "Result",
    "Segment",
    "StreamingRecognizer",
    "Transcript",
    "Word",
]
