"""Package -> one exported file with its description, kept only if it computes the same."""

import os
import shutil
import tempfile
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from inference.export.description import describe
from inference.export.graphs import StepGraph, WholeGraph, example
from inference.export.parity import check
from inference.files import read_config
from inference.hub import located
from inference.recognizer import Recognizer
from inference.streaming_ctc import check_streams
from modules.errors import UserError

TARGETS = {
    "onnx": "inference.export.onnx_file",
    "torch-export": "inference.export.torch_export",
    "torchscript": "inference.export.torchscript",
    "coreml": "inference.export.coreml",
}


def export(folder, target, output=None, int8=False, streaming=False, overwrite=False):
    """Export a package's encoder and CTC head -> (path, Parity).

    folder : package.py's; target : one of TARGETS
    output : the file; None: named after the package, in the working directory
    int8 : weights of linear layers as int8; streaming : one step, with its states
    The file is written beside its place, loaded, compared with the model, then renamed.
    UserError for what is missing, cannot be exported or does not compute the same.
    """
    module = import_module(TARGETS[target])
    require(target, module.PACKAGES)
    output = Path(output or default_name(Path(folder), module.SUFFIX, int8, streaming))
    check_output(output, module.SUFFIX, overwrite)
    folder = located(folder)
    recognizer = Recognizer.from_folder(folder, device="cpu")
    config = read_config(folder / "config.json")
    if streaming:
        check_streams(recognizer)
    graph = (StepGraph if streaming else WholeGraph)(recognizer).eval()
    n_mels = recognizer.features.fbank.compute_fbanks.n_mels
    description = describe(recognizer, config, graph, int8)
    whole = WholeGraph(Recognizer.from_folder(folder, device="cpu")).eval()
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as beside:
        path = Path(beside) / output.name
        run = module.convert(graph, example(graph, n_mels), path, int8, description)
        parity = check(whole, graph, run, n_mels, int8)
        if output.is_dir():  # a CoreML package
            shutil.rmtree(output)
        os.replace(path, output)
    return output, parity


def not_exported(folder):
    """What of a package stays behind, as a sentence; None: nothing."""
    config = read_config(located(folder) / "config.json")
    if "decoder" in config["parts"]:
        return "the decoder is not exported: the file hears what the CTC head alone does"
    if "ngram" in config:
        return "the n-gram is not exported: the file's texts are those of a search without it"
    return None


def require(target, packages):
    """UserError naming the extra when a target's package is missing."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise UserError(
            f"--to {target} needs {' and '.join(missing)}, of the extra `export`; run "
            '`pip install ".[export]"` in this repository'
        )


def default_name(folder, suffix, int8, streaming):
    marks = [mark for mark, on in (("streaming", streaming), ("int8", int8)) if on]
    return "-".join([folder.absolute().name, *marks]) + suffix


def check_output(output, suffix, overwrite):
    """UserError when the output has another suffix, no folder, or is there already."""
    if output.suffix != suffix:
        raise UserError(f"--output {output}: this target's files end in {suffix}")
    if not output.parent.is_dir():
        raise UserError(f"--output {output}: there is no folder {output.parent}; make it first")
    if output.is_dir() and not (output / "Manifest.json").is_file():  # which a CoreML package has
        raise UserError(f"--output {output} is a folder; give the name of a file")
    if output.exists() and not overwrite:
        raise UserError(f"{output} exists; give --overwrite, or another --output")
