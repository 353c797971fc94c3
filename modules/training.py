"""TrainingBrain: what the training of recognisers and of language models has in common."""

import logging
import os

import speechbrain as sb
import torch
from speechbrain.utils.checkpoints import ckpt_recency

from modules.batches import WholeStepSampler
from modules.checkpoints import average, best, newest
from modules.errors import MissingKey, UserError
from modules.keys import Attributes
from modules.loggers import make_loggers
from modules.optimizers import advance_before_steps, fused, parameter_groups
from modules.resuming import ResumingBrain

logger = logging.getLogger(__name__)


class TrainingBrain(ResumingBrain):
    """Optimises, logs, keeps the best checkpoints and evaluates their average.

    A subclass gives `compute_forward`, `compute_objectives` and `validation_statistics`, and names
    the statistic that ranks checkpoints.
    """

    checkpoint_metric = None
    higher_is_better = False
    parts = ()  # names of `modules`

    def __init__(self, hparams, run_opts):
        for name in self.parts:
            if name not in hparams["modules"]:
                raise MissingKey(f"{hparams.path}: modules lacks {name}; add {name}: !ref <{name}>")
        super().__init__(
            modules=hparams["modules"],
            opt_class=hparams["opt_class"],
            hparams=hparams,
            run_opts=run_opts,
            checkpointer=hparams["checkpointer"],
        )
        self.hparams = Attributes(hparams)
        self.noprogressbar = self.noprogressbar or not os.isatty(2)
        self.loggers = make_loggers(hparams)
        self.results, self.unread = {}, []

    # ---- Optimisation ----

    def init_optimizers(self):
        """Two parameter groups, with and without weight decay; one schedule for both."""
        weight_decay = getattr(self.hparams, "weight_decay", 0.0)
        everything = getattr(self.hparams, "decay_everything", False)
        opt_class = fused(self.opt_class, self.device, self.scaler)
        self.optimizer = opt_class(parameter_groups(self.modules, weight_decay, everything))
        self.optimizers_dict = {"optimizer": self.optimizer}
        if self.checkpointer is not None:
            self.checkpointer.add_recoverable("optimizer", self.optimizer)
        advance_before_steps(self.hparams.lr_scheduler, self.optimizer)

    def _train_loader_specifics(self, dataset, loader_kwargs):
        """Share the batches among the ranks, and tell the sampler every epoch."""
        rank, world_size = 0, 1
        if self.distributed_launch:
            rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.train_sampler = WholeStepSampler(
            loader_kwargs["batch_sampler"], self.grad_accumulation_factor, rank, world_size
        )
        return {**loader_kwargs, "batch_sampler": self.train_sampler}

    # ---- Stages ----

    def on_stage_end(self, stage, stage_loss, epoch=None):
        """Log training and validation, and write a checkpoint after them."""
        super().on_stage_end(stage, stage_loss, epoch)
        if stage == sb.Stage.TRAIN:
            loss = self.mean_of_ranks(self.avg_train_loss)  # `stage_loss` may lack the last step's
            self.train_stats = {"loss": loss, **self.training_statistics()}
        elif stage == sb.Stage.VALID:
            stats = {"loss": stage_loss, **self.validation_statistics()}
            if self.unread:
                stats["unread files"] = len(self.unread)
            self.loggers.log_stats(
                {"epoch": epoch, "lr": self.optimizer.param_groups[0]["lr"], **self.step_count()},
                train_stats=self.train_stats,
                valid_stats=stats,
            )
            self.save_checkpoint(epoch, stats)

    def mean_of_ranks(self, value):
        """Every rank has seen other batches: a number's mean over them."""
        if not self.distributed_launch:
            return value
        total = torch.tensor(float(value), device=self.device)
        torch.distributed.all_reduce(total)
        return total.item() / torch.distributed.get_world_size()

    def training_statistics(self):
        """What is logged of an epoch besides its loss: {name: number}."""
        return {"skipped batches": self.skipped_batches} if self.skipped_batches else {}

    def validation_statistics(self):
        """What is logged, and ranked by, after validation: {name: number}."""
        raise NotImplementedError

    def step_count(self):
        return {"steps": self.optimizer_step}

    def save_checkpoint(self, epoch, stats):
        """Keep the best checkpoints for averaging, and the newest for continuing."""
        metric = self.checkpoint_metric
        self.collect()
        keys = {"max_keys" if self.higher_is_better else "min_keys": [metric]}
        self.checkpointer.save_and_keep_only(
            meta={metric: stats[metric], "epoch": epoch},
            num_to_keep=self.hparams.avg_checkpoints,
            keep_recent=False,
            # SpeechBrain's default is one list for all calls, which `keep_recent` lengthens.
            importance_keys=[ckpt_recency],
            **keys,
        )

    # ---- Evaluating ----

    def on_evaluate_start(self, max_key=None, min_key=None):
        """Load the average of the best checkpoints, once; nothing is written or deleted."""
        if self.results:
            return
        self.graphs = self.sum = None  # frees their memory
        found = self.found_checkpoints()
        if not found:
            raise UserError(
                f"there is no checkpoint in {self.checkpointer.checkpoints_dir}; train first "
                "(without --skip_train), or give --resume a folder that holds one"
            )
        # The newest knows how long was trained; its weights give way to the average.
        self.checkpointer.load_checkpoint(newest(found))
        chosen = best(
            found, self.checkpoint_metric, self.higher_is_better, self.hparams.avg_checkpoints
        )
        self.hparams.model.load_state_dict(average(chosen), strict=True)
        logger.info("Evaluating the average of %d checkpoints", len(chosen))
