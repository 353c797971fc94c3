"""Trained models at work: package a training's output, load it, transcribe."""

from inference.recognizer import Recognizer
from inference.transcript import Transcript

__all__ = ["Recognizer", "Transcript"]
