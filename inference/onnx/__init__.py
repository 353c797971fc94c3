"""Exported models on onnxruntime, from file to transcript, without PyTorch."""

from inference.onnx.recognizer import OnnxRecognizer

__all__ = ["OnnxRecognizer"]
