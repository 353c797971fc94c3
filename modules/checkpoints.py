"""Checkpoints: written whole or not at all, and found again in other runs' folders."""

import os
import shutil
from functools import partial
from pathlib import Path

import torch
from speechbrain.utils import checkpoints
from speechbrain.utils.checkpoints import CKPT_PREFIX, METAFNAME
from speechbrain.utils.distributed import if_main_process

from modules.errors import UserError


class Checkpointer(checkpoints.Checkpointer):
    """SpeechBrain's, which takes a folder with a meta file for a checkpoint: it comes last here.

    A run killed while it saves leaves a folder that is no checkpoint; the next save removes it.
    """

    def save_checkpoint(self, *args, **kwargs):
        if if_main_process():
            for folder in self.checkpoints_dir.glob(f"{CKPT_PREFIX}+*"):
                if folder.is_dir() and not (folder / METAFNAME).is_file():
                    shutil.rmtree(folder)
        saved = super().save_checkpoint(*args, **kwargs)
        if saved is not None:
            meta = saved.path / METAFNAME
            os.replace(meta.with_suffix(".partial"), meta)
        return saved

    def _save_checkpoint_metafile(self, fpath, *args, **kwargs):
        partial = Path(fpath).with_suffix(".partial")
        return super()._save_checkpoint_metafile(partial, *args, **kwargs)


def newest(found):
    """The checkpoint written last, or None."""
    return max(found, key=checkpoints.ckpt_recency, default=None)


def best(found, metric, higher_is_better, number):
    """The best end-of-epoch checkpoints, best first, the newer of equals before the older.

    Where none was ranked (all were written within an epoch) the newest stands for them.
    """
    sign = 1 if higher_is_better else -1
    ranked = [c for c in found if metric in c.meta]
    ranked.sort(key=lambda c: (sign * c.meta[metric], checkpoints.ckpt_recency(c)), reverse=True)
    return ranked[:number] or [newest(found)]


def average(found):
    """The mean of checkpoints' weights of the model, {name: tensor}, on the CPU in any case."""
    read = partial(torch.load, map_location="cpu", weights_only=True)
    return checkpoints.average_checkpoints(found, "model", parameter_loader=read)


def resumable(place):
    """The checkpoints that `resume` names: one CKPT+... folder, or all of a run.

    UserError when there are none.
    """
    place = Path(place)
    if place.name.startswith(f"{CKPT_PREFIX}+") and place.is_dir():
        found = [c for c in list_checkpoints(place.parent) if c.path.name == place.name]
    else:
        found = list_checkpoints(place / "save") or list_checkpoints(place)
    if not found:
        raise UserError(
            f"resume={place} holds no checkpoint; give an output folder, its save folder, or one "
            "CKPT+... folder in it"
        )
    return found


def list_checkpoints(folder):
    """The checkpoints in a folder, which SpeechBrain's Checkpointer would make if missing."""
    return Checkpointer(folder).list_checkpoints() if Path(folder).is_dir() else []
