"""Where statistics go: the text log always; TensorBoard and wandb when asked for.

One that does not start is a mistake to be told before work begins. One that fails later is
reported once and left out; it never stops training.
"""

import logging
from pathlib import Path

from speechbrain.utils.train_logger import FileTrainLogger, TensorboardLogger, WandBLogger

from modules.errors import UserError
from modules.launch import on_main

logger = logging.getLogger(__name__)


class TrainLoggers:
    """Passes statistics to several SpeechBrain loggers.

    Arguments
    ---------
    train_log : path
        The text log, always written.
    others : dict of str to TrainLogger
        Other loggers by name.
    """

    def __init__(self, train_log, others):
        self.text = FileTrainLogger(str(train_log))
        self.others = dict(others)

    def log_stats(self, stats_meta, **stats):
        """See SpeechBrain's `TrainLogger.log_stats`. UserError when the text cannot be written."""
        try:
            self.text.log_stats(stats_meta, **stats)
        except OSError as error:
            raise UserError(
                f"{self.text.save_file} cannot be written: {error}; make room, and the same "
                "command goes on from the newest checkpoint"
            ) from error
        for name in list(self.others):
            try:
                self.others[name].log_stats(stats_meta, **stats)
            except Exception as error:
                logger.warning("%s is left out, training goes on: %s", name, error)
                del self.others[name]


class StepTensorboardLogger(TensorboardLogger):
    """SpeechBrain's logger, without test statistics: they have no epoch to be drawn at."""

    def log_stats(self, stats_meta, train_stats=None, valid_stats=None, **others):
        super().log_stats(stats_meta, train_stats=train_stats, valid_stats=valid_stats)


def make_loggers(hparams):
    """The loggers that the hparams ask for, on the main process only.

    UserError, in every process, when one of them does not start.
    """
    folder, made = Path(hparams["output_folder"]), {}

    def make(name, wanted, start):
        if not wanted:
            return
        try:
            made[name] = start()
        except Exception as error:
            remedy = f"pip install {name}, or " if isinstance(error, ImportError) else ""
            raise UserError(
                f"{name} does not start: {error}; {remedy}leave it out with --use_{name} False"
            ) from error

    on_main(
        make,
        "tensorboard",
        hparams["use_tensorboard"],
        lambda: StepTensorboardLogger(str(folder / "tensorboard")),
    )
    on_main(make, "wandb", hparams["use_wandb"], lambda: start_wandb(hparams, folder))
    return TrainLoggers(hparams["train_log"], made)


def start_wandb(hparams, folder):
    """One wandb run an output folder, resumed with it; WANDB_MODE=offline works without network."""
    import wandb

    id_file = folder / "wandb_id.txt"
    known = id_file.read_text().strip() if id_file.is_file() else ""
    plain = {k: v for k, v in hparams.items() if isinstance(v, str | int | float | bool | list)}
    try:
        run = wandb.init(
            project=hparams["wandb_project"],
            id=known or None,  # None: wandb draws one
            name=folder.name,
            dir=str(folder),
            resume="allow",
            config=plain,
        )
    except wandb.errors.Error as error:
        raise RuntimeError(
            f"{error}; log in with `wandb login`, or set WANDB_MODE=offline"
        ) from error
    id_file.write_text(run.id)
    return WandBLogger(lambda: run)
