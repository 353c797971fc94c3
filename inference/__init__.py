"""Trained models at work: package a training's output, load it, transcribe."""

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


def __getattr__(name):
    """Import PyTorch only for what needs it: an exported model does not."""
    if name == "Recognizer":
        from inference.recognizer import Recognizer

        return Recognizer
    if name == "StreamingRecognizer":
        from inference.streaming import StreamingRecognizer

        return StreamingRecognizer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
