"""A package to one file for another runtime: ONNX, torch.export, TorchScript, CoreML."""

from inference.export.exporting import TARGETS, export

__all__ = ["TARGETS", "export"]
