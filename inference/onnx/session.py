"""An exported file in onnxruntime, and what it says of itself."""

import json
from importlib.util import find_spec
from pathlib import Path

from modules.errors import UserError

KEY = "mamba_asr"  # of the description in the file's metadata
FORMAT = 1  # of the description; another number is refused


def open_session(path, threads=None):
    """onnxruntime's session of a file, on the CPU; UserError when it is none.

    threads: of one operator; None: onnxruntime's choice.
    """
    if find_spec("onnxruntime") is None:
        raise UserError(f"{path} needs onnxruntime; `pip install onnxruntime`")
    import onnxruntime

    if not Path(path).is_file():
        raise UserError(f"there is no file {path}; export.py makes one from a package")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        return onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own kinds share no base class
        reason = str(error).splitlines()[0][:200]
        raise UserError(f"{path} is damaged, or no ONNX model: {reason}; export it again") from None


def description(session, path):
    """What export.py wrote into the file; UserError for another program's."""
    text = session.get_modelmeta().custom_metadata_map.get(KEY)
    if text is None:
        raise UserError(f"{path} was not written by export.py: it does not say how to use it")
    found = json.loads(text)
    if found["format"] != FORMAT:
        raise UserError(
            f"{path} has format {found['format']} and this code reads {FORMAT}; export it again"
        )
    return found
