"""Checkpoints: written whole or not at all, checked, and found again in other runs' folders."""

import logging
import os
import shutil
from pathlib import Path
from typing import ClassVar

from speechbrain.utils import checkpoints
from speechbrain.utils.checkpoints import CKPT_PREFIX, METAFNAME, Checkpoint, ckpt_recency
from speechbrain.utils.distributed import main_process_only

from modules.digests import SUMS, damage, seal, sync
from modules.errors import UserError
from modules.tensors import load_tensors, no_code, unwritten

logger = logging.getLogger(__name__)

PARTIAL = "partial+"  # begins the names of folders that are being written or deleted


class Checkpointer(checkpoints.Checkpointer):
    """SpeechBrain's, which writes into the folder that it lists; here a whole one gets that name.

    A folder is written beside, with digests, brought to the disk and renamed, and only then are
    others deleted. Damaged ones are passed over with a warning, and neither counted nor deleted.
    The main process does all of this, and the others learn what came of it.
    """

    told: ClassVar = set()  # the damage that this process has warned of

    # ---- Writing ----

    def save_checkpoint(self, *args, **kwargs):
        """UserError, in every process, when the disk does not take it; the others stay whole."""
        saved, failure = self.write(*args, **kwargs)
        if failure:
            raise UserError(failure)
        return saved

    @main_process_only
    def write(self, *args, verbosity=logging.INFO, **kwargs):
        """(the checkpoint, None), or (None, why there is none)."""
        self.sweep()
        try:
            saved = super().save_checkpoint(*args, verbosity=logging.DEBUG, **kwargs)
            seal(saved.path)
            path = saved.path.with_name(saved.path.name.removeprefix(PARTIAL))
            os.rename(saved.path, path)
            sync(self.checkpoints_dir)
        except (OSError, RuntimeError) as error:
            self.sweep()
            if isinstance(error, RuntimeError) and not unwritten(error):
                raise
            last = newest(self.whole())
            return None, (
                f"a checkpoint could not be written to {self.checkpoints_dir}: {error}; "
                f"{megabytes(shutil.disk_usage(self.checkpoints_dir).free)} are free there. Make "
                "room (look at quotas too), or lower --avg_checkpoints. The same command then goes "
                f"on from {last.path if last else 'the beginning'}"
            )
        logger.log(verbosity, "Saved a checkpoint in %s", path)
        return Checkpoint(
            path, saved.meta, {n: path / p.name for n, p in saved.paramfiles.items()}
        ), None

    def _new_checkpoint_dirpath(self):
        path = super()._new_checkpoint_dirpath()
        return path.with_name(PARTIAL + path.name)

    def sweep(self):
        """Remove what a killed or failed process left of a checkpoint."""
        for folder in self.checkpoints_dir.glob(f"{PARTIAL}{CKPT_PREFIX}+*"):
            shutil.rmtree(folder)
        # Earlier versions wrote the file that makes a checkpoint last, in place.
        for folder in self.folders():
            if not is_checkpoint(folder):
                shutil.rmtree(folder)

    @main_process_only
    def delete_checkpoints(
        self,
        *,
        num_to_keep=1,
        min_keys=None,
        max_keys=None,
        importance_keys=(ckpt_recency,),
        ckpt_predicate=None,
        verbosity=logging.INFO,
    ):
        """Keep the first `num_to_keep` in each order; the others lose their name, then go."""
        orders = [{"min_key": key} for key in min_keys or []]
        orders += [{"max_key": key} for key in max_keys or []]
        orders += [{"importance_key": key} for key in importance_keys]
        ranked = [self.find_checkpoints(**o, ckpt_predicate=ckpt_predicate) for o in orders]
        kept = {c.path for found in ranked for c in found[:num_to_keep]}
        for path in {c.path for found in ranked for c in found} - kept:
            aside = path.with_name(PARTIAL + path.name)
            os.rename(path, aside)
            shutil.rmtree(aside)
            logger.log(verbosity, "Deleted the checkpoint %s", path)

    @main_process_only
    def space_missing(self, model, copies, beside=2):
        """Why the disk cannot take so many more checkpoints of a model; None when it can."""
        self.sweep()
        weights = sum(tensor.nbytes for tensor in model.state_dict().values())
        # Adam's two moments, and what else is kept beside the weights.
        size = weights + beside * sum(p.nbytes for p in model.parameters() if p.requires_grad)
        free = shutil.disk_usage(self.checkpoints_dir).free
        if free >= copies * size:
            return None
        return (
            f"{self.checkpoints_dir} has {megabytes(free)} free, and this run will write "
            f"{megabytes(copies * size)}: {copies} checkpoints of {megabytes(size)}. Make room, "
            "lower --avg_checkpoints, or give an --output_folder on another disk"
        )

    # ---- Reading ----

    def load_checkpoint(self, checkpoint):
        """UserError when one of its files would run code: SpeechBrain reads weights alone too."""
        with no_code(checkpoint.path):
            super().load_checkpoint(checkpoint)

    # ---- Finding ----

    @main_process_only
    def list_checkpoints(self):
        """The whole checkpoints. All processes call it, and all get the main one's answer."""
        return self.whole()

    def folders(self):
        """All folders with a checkpoint's name."""
        return [p for p in self.checkpoints_dir.glob(f"{CKPT_PREFIX}+*") if p.is_dir()]

    def whole(self):
        """The whole checkpoints, for one process alone; warns of damaged ones, once.

        UserError when all are damaged: to start over is not what was asked.
        """
        damaged = {p: damage(p) for p in self.folders() if is_checkpoint(p)}
        found = self._construct_checkpoint_objects([p for p, why in damaged.items() if not why])
        damaged = {p: why for p, why in damaged.items() if why and p.is_dir()}
        if damaged and not found:
            each = "; ".join(f"{p.name}: {why}" for p, why in damaged.items())
            raise UserError(
                f"{self.checkpoints_dir} holds no whole checkpoint ({each}); restore one from a "
                "copy, or delete these folders to start over"
            )
        for path, why in damaged.items():
            if (path, why) not in self.told:
                self.told.add((path, why))
                logger.warning(
                    "The checkpoint %s is damaged (%s) and is passed over; the newest whole one is "
                    "%s",
                    path,
                    why,
                    newest(found).path,
                )
        return found


def is_checkpoint(folder):
    """Whether a folder is one, whole or not, rather than what an earlier version left of one."""
    return (folder / METAFNAME).exists() or (folder / SUMS).exists()


def megabytes(number):
    return f"{number / 1e6:,.1f} MB"


def newest(found):
    """The checkpoint written last, or None."""
    return max(found, key=ckpt_recency, default=None)


def best(found, metric, higher_is_better, number):
    """The best end-of-epoch checkpoints, best first, the newer of equals before the older.

    Where none was ranked (all were written within an epoch) the newest stands for them.
    """
    sign = 1 if higher_is_better else -1
    ranked = [c for c in found if metric in c.meta]
    ranked.sort(key=lambda c: (sign * c.meta[metric], ckpt_recency(c)), reverse=True)
    return ranked[:number] or [newest(found)]


def average(found):
    """The mean of checkpoints' weights of the model, {name: tensor}, on the CPU in any case."""
    return checkpoints.average_checkpoints(
        found, "model", parameter_loader=lambda path, map_location: load_tensors(path)
    )


def resumable(place):
    """The checkpoints that `resume` names: one CKPT+... folder, or all of a run.

    UserError when there are none.
    """
    place = Path(place)
    if place.name.startswith(f"{CKPT_PREFIX}+") and place.is_dir():
        if is_checkpoint(place) and (why := damage(place)):
            raise UserError(f"resume={place} is damaged ({why}); give another checkpoint")
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
    """The whole checkpoints in a folder, which a Checkpointer would make if missing."""
    return Checkpointer(folder).whole() if Path(folder).is_dir() else []
