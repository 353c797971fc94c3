"""Where statistics go: the text log always; TensorBoard and wandb when asked for.

A logger that fails is reported once and left out; it never stops training.
"""

import logging
from pathlib import Path

from speechbrain.utils.distributed import if_main_process
from speechbrain.utils.train_logger import FileTrainLogger, TensorboardLogger, WandBLogger

logger = logging.getLogger(__name__)


class TrainLoggers:
    """Passes statistics to several SpeechBrain loggers.

    Arguments
    ---------
    train_log : path
        The text log, always written.
    factories : dict of str to callable
        Other loggers by name, made here.
    """

    def __init__(self, train_log, factories):
        self.text = FileTrainLogger(str(train_log))
        self.others = {}
        for name, make in factories.items():
            try:
                self.others[name] = make()
            except Exception as error:
                report(name, error)

    def log_stats(self, stats_meta, **stats):
        """See SpeechBrain's `TrainLogger.log_stats`."""
        self.text.log_stats(stats_meta, **stats)
        for name in list(self.others):
            try:
                self.others[name].log_stats(stats_meta, **stats)
            except Exception as error:
                report(name, error)
                del self.others[name]


def report(name, error):
    remedy = f" (pip install {name})" if isinstance(error, ImportError) else ""
    logger.warning("%s is left out, training goes on: %s%s", name, error, remedy)


class StepTensorboardLogger(TensorboardLogger):
    """SpeechBrain's logger, without test statistics: they have no epoch to be drawn at."""

    def log_stats(self, stats_meta, train_stats=None, valid_stats=None, **others):
        super().log_stats(stats_meta, train_stats=train_stats, valid_stats=valid_stats)


def make_loggers(hparams):
    """The loggers that the hparams ask for, on the main process only."""
    folder = Path(hparams["output_folder"])
    factories = {}
    if if_main_process():
        if hparams["use_tensorboard"]:
            factories["tensorboard"] = lambda: StepTensorboardLogger(str(folder / "tensorboard"))
        if hparams["use_wandb"]:
            factories["wandb"] = lambda: start_wandb(hparams, folder)
    return TrainLoggers(hparams["train_log"], factories)


def start_wandb(hparams, folder):
    """One wandb run an output folder, resumed with it; WANDB_MODE=offline works without network."""
    import wandb

    id_file = folder / "wandb_id.txt"
    run_id = id_file.read_text().strip() if id_file.is_file() else wandb.util.generate_id()
    id_file.write_text(run_id)
    plain = {k: v for k, v in hparams.items() if isinstance(v, str | int | float | bool | list)}
    try:
        run = wandb.init(
            project=hparams["wandb_project"],
            id=run_id,
            name=folder.name,
            dir=str(folder),
            resume="allow",
            config=plain,
        )
    except wandb.errors.Error as error:
        raise RuntimeError(
            f"{error}; log in with `wandb login`, or set WANDB_MODE=offline"
        ) from error
    return WandBLogger(lambda: run)
