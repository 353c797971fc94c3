"""Trained models at work: package a training's output, load it, transcribe."""

from inference.recognizer import Recognizer
from inference.transcript import Result, Segment, Transcript, Word

__all__ = ["Recognizer", "Result", "Segment", "Transcript", "Word"]
