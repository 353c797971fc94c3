"""Run by torchrun: what `on_main` does when it works, and when it fails.

torchrun --nproc-per-node 2 tests/recipes/ranks.py FOLDER
"""

import os
import sys
from pathlib import Path

import torch

from modules.errors import UserError
from modules.launch import on_main


def append(path):
    with open(path, "a", encoding="utf-8") as f:
        f.write("once\n")


def refuse():
    raise UserError("no such corpus")


folder = Path(sys.argv[1])
torch.distributed.init_process_group("gloo")
on_main(append, folder / "prepared")
# Whoever comes here finds what the main process made.
there = (folder / "prepared").read_text()
try:
    on_main(refuse)
except UserError as error:
    (folder / f"rank{os.environ['RANK']}").write_text(f"{there}{error}")
torch.distributed.destroy_process_group()
