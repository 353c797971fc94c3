"""A package to one file for another runtime: ONNX, torch.export, TorchScript, CoreML."""

from inference.export.exporting import TARGETS, export, not_exported

__all__ = ["TARGETS", "export", "not_exported"]
