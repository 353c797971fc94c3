"""Files of tensors: what is damaged and what does not fit on a disk is told in a line."""

import random
import subprocess
import sys

import pytest
import torch

from modules.errors import UserError
from modules.tensors import load_tensors, save_tensors
from tests.recipes import runs
from tests.test_checkpoints import limit_files


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_files_of_any_bytes(tmp_path):
    """PyTorch meets some with an IndexError or a struct.error, which tells nobody anything."""
    path, bytes = tmp_path / "a.ckpt", random.Random(0)
    for _ in range(400):
        path.write_bytes(bytes.randbytes(bytes.choice((1, 5, 40, 1000))))
        with pytest.raises(UserError, match=r"a.ckpt"):
            load_tensors(path)


def test_a_file_that_does_not_fit(tmp_path):
    (tmp_path / "a.ckpt").write_text("old")
    code = "import sys, torch; from modules.tensors import save_tensors\n"
    code += "from modules.command import plain_errors\n"
    code += "with plain_errors(): save_tensors(torch.zeros(100_000), sys.argv[1])"
    finished = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.ckpt")],
        capture_output=True,
        text=True,
        cwd=runs.ROOT,
        preexec_fn=limit_files(200_000),
        check=False,
    )
    assert finished.returncode == 2, finished.stderr
    (told,) = finished.stderr.splitlines()
    assert "a.ckpt could not be written" in told and "MB are free there" in told
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]


def test_other_errors_of_writing_are_not_taken_for_a_full_disk(tmp_path):
    class Broken:
        def __reduce__(self):
            raise RuntimeError("of another kind")

    with pytest.raises(RuntimeError, match="of another kind"):
        save_tensors({"a": Broken(), "b": torch.ones(2)}, tmp_path / "a.ckpt")
    assert not list(tmp_path.iterdir())
