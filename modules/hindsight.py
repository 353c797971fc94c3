"""Steps that the device decides, and of which the host learns when it has launched more."""

import math

import torch
from torch.nn.utils import get_total_norm

from modules.accumulation import GradientSum
from modules.nonfinite import FiniteBrain, lost, suspects
from modules.optimizers import clip


class Told:
    """Numbers on their way from the device, for which its later work need not be waited for."""

    def __init__(self, *numbers):
        numbers = torch.stack(numbers)
        self.copy = numbers.to("cpu", non_blocking=True)  # pinned, of a CUDA device
        self.arrived = torch.cuda.Event() if numbers.is_cuda else None
        if self.arrived is not None:
            self.arrived.record()

    def read(self):
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.copy.tolist()


class Unsettled:
    """A batch that the device counts or leaves out, and the step that it takes behind it, or not.

    norm: of the step's gradients; none where the batch is not the step's last.
    """

    def __init__(self, brain, *norm):
        self.batch, self.step = brain.current, brain.step
        self.told = Told(brain.loss, *norm)
        self.schedule = dict(vars(brain.hparams.lr_scheduler))
        self.rates = [group["lr"] for group in brain.optimizer.param_groups]


class HindsightBrain(FiniteBrain):
    """Leaves out what is not finite without the host's waiting, on one device with CUDA graphs.

    A host that must know of the loss before the backward pass, of the gradients before the step,
    or of the step before the next batch, leaves the device without work each time. Here it learns
    of a batch, and of a step, with `settle`: once the next batch's forward pass is launched, or
    earlier where its outcome is asked for, at a checkpoint or an epoch's end. What is counted,
    logged and saved is the same.
    """

    graphs = None  # those of training, where a subclass has some

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.unsettled = None  # the last batch, while the host has not looked
        self.sum = None  # of gradients, where a step is more than one batch
        self.good = False  # on the device: whether a batch of this step is

    def looks_back(self):
        """Whether a step is decided on the device, and the host learns of it afterwards.

        It takes an optimizer that can skip by itself.
        """
        if self.graphs is None or self.scaler.is_enabled() or self.distributed_launch:
            return False
        return all(group.get("fused") for group in self.optimizer.param_groups)

    def on_fit_batch_start(self, batch, should_step):
        """While features' statistics grow, those after a wrong batch are needed before the next.

        In these epochs the host waits for the device anyway, to count the frames.
        """
        normalize, epoch = self.hparams.normalize, self.hparams.epoch_counter.current
        if normalize.norm_type == "global" and normalize._should_update(epoch):
            self.settle()
        super().on_fit_batch_start(batch, should_step)

    def check_loss_isfinite(self, loss):
        if not self.looks_back():
            super().check_loss_isfinite(loss)

    def gather(self, loss, should_step):
        """What a batch, behind its backward pass, brings to its step.

        loss: the batch's, (), on the device.
        """
        back = self.looks_back()
        if not back and self.graphs is None:
            return
        good = loss.isfinite() & (not lost(self.current))
        if self.grad_accumulation_factor > 1:
            self.add_up(good, should_step)
        if back:
            self.loss, self.good = loss, good | self.good
            if not should_step:
                self.unsettled = Unsettled(self)

    def add_up(self, good, should_step):
        if self.sum is None:
            self.sum = GradientSum(self.hparams.model.parameters())
        together = self.graphs is not None and self.graphs.attached()
        self.sum.add(good, self.graphs.flat if together else None)
        if should_step:
            self.sum.give()

    def optimizers_step(self):
        """A step, which changes nothing when losses or gradients are not finite."""
        if not self.looks_back():
            super().optimizers_step()
            return
        gradients = self.gradients()
        norm = get_total_norm(gradients)
        good = self.good & norm.isfinite()
        self.unsettled = Unsettled(self, norm)
        clip(gradients, norm, self.max_grad_norm)
        # As a gradient scaler tells a fused optimizer to skip.
        self.optimizer.found_inf = (~good).float()
        self.optimizer.step()
        self.optimizer.found_inf = None
        self.zero_grad(set_to_none=True)
        self.granted = tuple(map(bool, self.requests()))

    def settle(self):
        """Learn what became of the last batch and its step, and do what hangs on it."""
        last, self.unsettled = self.unsettled, None
        if last is None:
            return
        loss, *norm = last.told.read()
        finite = math.isfinite(loss) and not lost(last.batch)
        if not finite:
            self.restore_statistics()
        self.batches.append((finite, last.batch.id if finite else suspects(last.batch)))
        if norm:
            self.settle_step(last, *norm)
        self.avg_train_loss = self.update_average(loss, self.avg_train_loss, last.step)

    def settle_step(self, last, norm):
        dropped, kept = self.dropped_and_kept()
        right = math.isfinite(norm) or not kept  # of wrong losses they are no news
        if not (kept and right):
            vars(self.hparams.lr_scheduler).update(last.schedule)
            for group, rate in zip(self.optimizer.param_groups, last.rates, strict=True):
                group["lr"] = rate
        if self.judge(dropped, kept, wrong=not right):
            self.count_step()

    def zero_grad(self, set_to_none=False):
        super().zero_grad(set_to_none)
        self.good = False
        if self.sum is not None:
            self.sum.forget()

    def update_average(self, loss, avg_loss, step=None):
        """The mean loss, without a batch's that is unsettled: that comes when it is settled."""
        return avg_loss if self.unsettled else super().update_average(loss, avg_loss, step)

    @property
    def _optimizer_step_limit_exceeded(self):
        """Where the last step decides it, it is settled."""
        limit = self.optimizer_step_limit
        if limit is not None and self.optimizer_step + 1 >= limit:
            self.settle()
        return super()._optimizer_step_limit_exceeded
