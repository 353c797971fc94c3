"""Numbers that go wrong: no step is taken on a loss or gradients that are NaN or infinite."""

import logging
import math

import speechbrain as sb
import torch
from speechbrain.utils.distributed import if_main_process
from torch.nn.utils import get_total_norm

from modules.checkpoints import newest
from modules.errors import UserError
from modules.optimizers import clip, gradients_of

logger = logging.getLogger(__name__)


class FiniteBrain(sb.Brain):
    """SpeechBrain's Brain, which leaves out what is not finite instead of learning from it.

    A batch whose loss is not finite gives no gradient, and the others of its optimizer step
    count. When nothing of a step is left, or the gradients are not finite, the whole step is
    skipped: weights, optimizer, schedule and `optimizer_step` stay as they are. After
    `max_nonfinite_steps` skipped steps in a row training stops.

    Every process takes the same decision, or the others would wait for it forever. Overflow in
    fp16 is left to the scaler, which skips the step and lowers its scale.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.hooks = []
        self.batches = []  # of this step and process: [(whether the loss is finite, ids)]
        self.skipped_in_a_row = 0
        self.forget_epoch()

    def forget_epoch(self):
        """Start counting anew; batches that never came to a step are forgotten."""
        self.batches.clear()
        self.skipped_batches = 0
        self.unalignable = []  # [(marks (B,) on the device, ids)]
        self.short = []  # ids of those that were marked

    # ---- Losses ----

    def on_fit_batch_start(self, batch, should_step):
        normalize = self.hparams.normalize
        self.statistics = normalize.count, normalize.glob_mean, normalize.glob_std

    def check_loss_isfinite(self, loss):
        """Take note of the batch before its backward pass, which a wrong loss goes through too.

        Its gradients become zero as they reach the parameters: other processes exchange theirs
        in this pass, and wait for all.
        """
        finite = bool(torch.isfinite(loss)) and not lost(self.current)
        self.batches.append((finite, self.current.id if finite else suspects(self.current)))
        if not finite:
            parameters = [p for p in self.modules.parameters() if p.requires_grad]
            self.hooks = [p.register_hook(torch.zeros_like) for p in parameters]
            self.restore_statistics()

    def remove_hooks(self):
        """After the backward pass."""
        for hook in self.hooks:
            hook.remove()
        self.hooks = []

    def restore_statistics(self):
        """Undo what audio that is not finite did to the features' mean and deviation.

        Only then: the processes share these numbers and must keep the same ones.
        """
        normalize = self.hparams.normalize
        if not (normalize.glob_mean.isfinite().all() and normalize.glob_std.isfinite().all()):
            self.forget_statistics()

    def forget_statistics(self):
        """Back to what they were before the batch."""
        normalize = self.hparams.normalize
        normalize.count, normalize.glob_mean, normalize.glob_std = self.statistics

    def update_average(self, loss, avg_loss, step=None):
        """SpeechBrain's starts from 0, and would count a first batch that is not finite as 0."""
        loss, step = float(loss), step or self.step
        if not math.isfinite(loss):
            return avg_loss
        if avg_loss == 0:
            return loss
        avg_loss -= avg_loss / step
        return avg_loss + loss / step

    # ---- Steps ----

    def optimizers_step(self):
        """A step, unless there is nothing finite to step on.

        SpeechBrain's clips the first group of parameters alone. Here one norm, over all of them,
        serves the check and the clipping.
        """
        gradients, norm, wrong = self.gradients(), None, False
        if not self.scaler.is_enabled():  # else overflow is its business
            norm = get_total_norm(gradients)
            wrong = not norm.isfinite()
        told = *self.dropped_and_kept(), wrong, *self.requests()
        dropped, kept, wrong, *granted = self.sum_of_ranks(*told)
        self.granted = tuple(map(bool, granted))
        good = self.judge(dropped, kept, wrong)
        if good:
            self.step_now(gradients, norm)
        self.zero_grad(set_to_none=True)
        if good:
            self.count_step()

    def dropped_and_kept(self):
        """How many of this step's batches have a loss that is not finite, and how many others."""
        dropped = sum(not finite for finite, _ in self.batches)
        return dropped, len(self.batches) - dropped

    def judge(self, dropped, kept, wrong):
        """Say which of `batches` had what was not finite: whether there is a step to take.

        Arguments
        ---------
        dropped, kept : int
            Batches whose loss is not finite, and the others.
        wrong : int or bool
            Whether the gradients are not.
        """
        skip = wrong > 0 or kept == 0
        if skip or dropped:
            self.skipped_batches += dropped + (kept if wrong else 0)
            ids = [i for finite, ids in self.batches if wrong or not finite for i in ids]
            ids = sorted({i for rank in self.of_ranks(ids) for i in rank})
            what = "gradients are" if wrong else f"loss of {dropped} of {dropped + kept} batches is"
            if if_main_process():
                logger.warning(
                    "Step %d: the %s not finite; %s, %d batches of this epoch so far: %s",
                    self.optimizer_step + 1,
                    what,
                    "the step is skipped" if skip else "left out",
                    self.skipped_batches,
                    ", ".join(ids),
                )
        self.batches.clear()
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skip else 0
        # Files of before the key was there have the shipped files' limit.
        if self.skipped_in_a_row >= getattr(self.hparams, "max_nonfinite_steps", 10):
            raise UserError(self.why_stop(ids))
        return not skip

    def count_step(self):
        self.optimizer_step += 1
        self.stepped()

    def stepped(self):
        """After a step that was taken."""

    def requests(self):
        """What this process wants after the step, as flags; one process is enough."""
        return ()

    def step_now(self, gradients, norm):
        """Clip and step; in fp16 the norm is known once the scale is taken out."""
        if self.scaler.is_enabled():
            self.scaler.unscale_(self.optimizer)
            norm = get_total_norm(gradients)
        clip(gradients, norm, self.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def gradients(self):
        """Tensors that hold all gradients of the step."""
        return gradients_of(self.optimizer)

    def why_stop(self, ids):
        """What happened, where the last good weights are, and what to try."""
        last = newest(self.checkpointer.list_checkpoints())
        rate = "lr_model" if hasattr(self.hparams, "lr_model") else "lr_adam"
        named = ", ".join(ids[:5]) + (" ..." if len(ids) > 5 else "")
        return (
            f"{self.skipped_in_a_row} steps in a row had no finite loss and gradients, the last "
            f"after {self.optimizer_step} good steps, on {named}; none of them changed the "
            f"weights. The last good checkpoint is {last.path if last else '(none yet)'}. Look at "
            f"the utterances that log.txt names, lower --{rate}, or try --precision fp32; the "
            "same command then goes on from that checkpoint"
        )

    # ---- Utterances that CTC cannot align ----

    def find_unalignable(self):
        """Read the marks, which the device need not be waited for in every step."""
        for marks, ids in self.unalignable:
            self.short += [i for i, mark in zip(ids, marks.tolist(), strict=True) if mark]
        self.unalignable.clear()

    def report_unalignable(self):
        """Warn, once an epoch, of the utterances that had too few frames for their tokens."""
        self.find_unalignable()
        found = self.of_ranks((len(self.short), self.short[:5]))
        number = sum(count for count, _ in found)
        if number and if_main_process():
            logger.warning(
                "%d utterances have too few frames for their tokens and counted zero in the CTC "
                "loss, among them %s",
                number,
                ", ".join([i for _, first in found for i in first][:5]),
            )

    # ---- Processes ----

    def sum_of_ranks(self, *numbers):
        """The sums of whole numbers over all processes."""
        if not self.distributed_launch:
            return numbers
        sums = torch.tensor(numbers, dtype=torch.int32, device=self.device)
        torch.distributed.all_reduce(sums)
        return sums.tolist()

    def of_ranks(self, thing):
        """Every process's thing: a list."""
        if not self.distributed_launch:
            return [thing]
        things = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(things, thing)
        return things


def lost(batch):
    """Whether nothing of it could be read."""
    return getattr(batch, "lost", False)  # text has no such mark


def suspects(batch):
    """The ids of a batch's utterances whose audio is not finite; when there are none, all."""
    if not hasattr(batch, "sig"):  # text
        return batch.id
    finite = batch.sig.data.isfinite().all(dim=1).tolist()
    return [i for i, good in zip(batch.id, finite, strict=True) if not good] or batch.id
