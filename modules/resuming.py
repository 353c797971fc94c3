"""Runs that go on where they were stopped, to the bit: what is saved, when, and found again."""

import hashlib
import logging
import math
import time

import speechbrain as sb
from speechbrain.utils.distributed import ddp_broadcast, if_main_process

from modules.checkpoints import newest, resumable
from modules.errors import Stopped, UserError
from modules.launch import on_main
from modules.memory import HalvingBrain
from modules.progress import Clock, RankStates
from modules.randomness import generator_states, set_generator_states
from modules.signals import StopRequest
from modules.tensors import load_tensors
from modules.workers import Restarting, end_workers

logger = logging.getLogger(__name__)

FEATURES = ("sample_rate", "n_fft", "win_length", "hop_length")  # n_mels is a shape of the model's


class ResumingBrain(HalvingBrain):
    """Saves within epochs and at a signal, and goes on as if it had never stopped.

    SpeechBrain's Brain and loader recover the place in the epoch. Beside it each process's random
    generators and counts of the epoch are saved. A checkpoint is written at the end of an
    optimizer step only, so there are no gradients to save, and all processes agree on it.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # Converted checkpoints hold weights and feature statistics, and nothing of a training.
        self.checkpointer.allow_partial_load = True
        self.ranks = RankStates()
        self.checkpointer.add_recoverable("ranks", self.ranks)
        self.clock = Clock()
        self.checkpointer.add_recoverable("clock", self.clock)
        self.stop_request = StopRequest()
        self.granted = False, False
        self.saved_at = 0.0, 0  # clock, batch of the epoch

    # ---- Saving ----

    def fit(self, *args, **kwargs):
        """SpeechBrain's; raises Stopped when a signal has ended it and a checkpoint is saved."""
        self.loaders = set()
        try:
            with self.stop_request:
                super().fit(*args, **kwargs)
        finally:
            for loader in self.loaders:
                end_workers(loader)
        if self.stop_request.name:
            self.stop()  # it came in the last moments

    def _fit_train(self, train_set, epoch, enable):
        if self.step and self.has_other_batches(epoch):
            self.start_anew(epoch, train_set)
        super()._fit_train(self.restarting(train_set), epoch, enable)

    def _fit_valid(self, valid_set, epoch, enable):
        super()._fit_valid(None if valid_set is None else self.restarting(valid_set), epoch, enable)

    def restarting(self, loader):
        self.loaders.add(loader)
        return Restarting(loader)

    def requests(self):
        """Whether this process wants a checkpoint, and an end, after the present step."""
        clock, batch = self.saved_at
        minutes, steps = self.ckpt_interval_minutes, self.ckpt_interval_steps
        due = 0 < 60 * minutes <= time.monotonic() - clock or 0 < steps <= self.step - batch
        return due, self.stop_request.name is not None

    def _should_save_intra_epoch_ckpt(self, last_ckpt_time, steps_since_ckpt):
        """At the end of a step, when one process or another wants it."""
        (save, stop), self.granted = self.granted, (False, False)
        if save or stop:
            self.settle()
        if stop:
            self._save_intra_epoch_ckpt()
            self.stop()
        return save

    def _save_intra_epoch_ckpt(self):
        self.collect()
        super()._save_intra_epoch_ckpt()
        self.saved_at = time.monotonic(), self.step

    def collect(self):
        """Have every process's state ready for the main one to save."""
        self.find_unalignable()
        state = {
            "meaning": self.meaning(),
            "batches": self.train_sampler.digest,
            "generators": generator_states(),
            "avg_train_loss": self.avg_train_loss,
            "skipped_batches": self.skipped_batches,
            "skipped_in_a_row": self.skipped_in_a_row,
            "short": self.short,
            "unread": self.unread,
        }
        self.ranks.states = self.of_ranks(state)

    def meaning(self):
        """What the model's inputs and outputs stand for, which no shape tells: {name: value}"""
        labels = "\n".join(self.hparams.tokenizer.labels)
        features = {name: getattr(self.hparams, name, None) for name in FEATURES}
        return {"tokens": hashlib.sha256(labels.encode()).hexdigest(), **features}

    def stop(self):
        raise Stopped(
            f"stopped by {self.stop_request.name or 'a signal to another process'}; everything is "
            f"saved in {self.checkpointer.checkpoints_dir}, and the same command goes on from there"
        )

    def evaluate_batch(self, batch, stage):
        """Between batches of the validation too, a signal is heeded: as if it came before it."""
        if stage == sb.Stage.VALID and any(self.sum_of_ranks(bool(self.stop_request.name))):
            self.save_before_validation()
            self.stop()
        return super().evaluate_batch(batch, stage)

    def save_before_validation(self):
        """Save as after the epoch's last step, to go on with its validation."""
        self.step, self.avg_train_loss, self.unread = self.trained
        self._save_intra_epoch_ckpt()

    # ---- Going on ----

    def on_fit_start(self):
        """Recover this run's newest checkpoint, or start from `resume`."""
        super().on_fit_start()
        if self.checkpointer.find_checkpoint() is None and self.hparams.resume:
            start = newest(self.found_checkpoints())
            logger.info("Starting from %s", start.path)
            self.checkpointer.load_checkpoint(start)
        elif self.hparams.resume:
            logger.info(
                "%s holds checkpoints of its own: resume=%s is not used",
                self.checkpointer.checkpoints_dir,
                self.hparams.resume,
            )
        if self.optimizer_step and not self.clock.before:
            self.clock.before = math.nan  # the checkpoint is of before there was a clock
        self.check_space()

    def on_stage_start(self, stage, epoch=None):
        """Fresh counts for a new epoch; those of one that goes on, and its random numbers."""
        if stage != sb.Stage.TRAIN:
            return
        self.forget_epoch()
        states, self.ranks.states = self.ranks.states, []
        world_size = len(self.of_ranks(None))
        if len(states) == world_size:
            self.restore(states[self.rank if self.distributed_launch else 0])
        elif states:
            logger.warning(
                "The checkpoint is of %d processes, and these are %d: training goes on, but not "
                "to the bit as it would have",
                len(states),
                world_size,
            )
        self.saved_at = time.monotonic(), self.step

    def has_other_batches(self, epoch):
        """Whether the place in the epoch is one in another list: of another corpus, for example.

        Checkpoints of before lists had a digest are taken at their word.
        """
        self.train_sampler.set_epoch(epoch)
        digest = self.train_sampler.digest
        return any(state.get("batches", digest) != digest for state in self.ranks.states)

    def start_anew(self, epoch, loader):
        """Forget the place in the epoch, and keep all that was learnt."""
        if if_main_process():
            logger.warning(
                "Epoch %d was stopped after %d batches, and has others now (another corpus, or "
                "other options): it starts anew, with the weights as they are",
                epoch,
                self.step,
            )
        self.step, self.avg_train_loss = 0, 0.0
        loader._speechbrain_recovery_skip_to = None

    def restore(self, state):
        set_generator_states(state["generators"])
        self.skipped_in_a_row = state["skipped_in_a_row"]
        if self.step:
            self.avg_train_loss = state["avg_train_loss"]
            self.skipped_batches = state["skipped_batches"]
            self.short = state["short"]
            self.unread = state["unread"]

    def on_stage_end(self, stage, stage_loss, epoch=None):
        if stage == sb.Stage.TRAIN:
            self.settle()
            self.trained = self.step, self.avg_train_loss, list(self.unread)

    def found_checkpoints(self):
        """This run's whole checkpoints; those that `resume` names when it has none yet.

        The same in every process, and so is a UserError.
        """
        found = []

        def find():
            found.extend(self.checkpointer.whole())
            if self.hparams.resume and not found:
                found.extend(resumable(self.hparams.resume))

        on_main(find)
        return ddp_broadcast(found)

    # ---- Before the first step ----

    def check_start(self):
        """UserError when the checkpoint to go on from is missing, or of another model."""
        start = newest(self.found_checkpoints())
        if start is None:
            return
        theirs = load_tensors(start.paramfiles["model"], mmap=True)
        ours = self.hparams.model.state_dict()
        shapes = [{k: tuple(v.shape) for k, v in state.items()} for state in (theirs, ours)]
        for name in shapes[0] | shapes[1]:
            there, here = (s.get(name, "missing") for s in shapes)
            if there != here:
                raise UserError(
                    f"the model in {start.path} is another ({name}: {there} there, {here} here); "
                    "give the options it was trained with (hyperparams.yaml in its output "
                    "folder), or a new --output_folder"
                )
        self.check_meaning(start)

    def check_meaning(self, start):
        """UserError when a checkpoint was trained on other features, or for other tokens.

        Those of before this was saved, and converted ones, are taken at their word.
        """
        ranks = RankStates()
        if "ranks" in start.paramfiles:
            ranks.load(start.paramfiles["ranks"], end_of_epoch=True)
        ours = self.meaning()
        theirs = ranks.states[0].get("meaning", ours) if ranks.states else ours
        told = [f"{n}={theirs[n]} (here {ours[n]})" for n in FEATURES if theirs[n] != ours[n]]
        if theirs["tokens"] != ours["tokens"]:
            told.append("other tokens, or in another order (--alphabet, tokenizer.ckpt)")
        if told:
            raise UserError(
                f"the model in {start.path} was trained with {', '.join(told)}; give what it was "
                "trained with (hyperparams.yaml in its output folder), or train anew in another "
                "--output_folder, without --resume"
            )

    def check_space(self):
        """UserError unless the disk takes all checkpoints that this run will have at a time."""
        counter = self.hparams.epoch_counter
        epochs = counter.limit - counter.current
        if epochs <= 0:
            return
        # The best and the newest are kept, and one within an epoch; one more is being written.
        within = self.ckpt_interval_minutes > 0 or self.ckpt_interval_steps > 0
        most = 2 * self.hparams.avg_checkpoints + within + 1
        copies = min(most - len(self.checkpointer.list_checkpoints()), epochs + within)
        beside = 3 if getattr(self.hparams, "ema_decay", 0) else 2
        missing = self.checkpointer.space_missing(self.hparams.model, max(copies, 1), beside)
        if missing:
            raise UserError(missing)
