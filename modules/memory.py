"""Device memory that runs out: the batch again in halves, or the key to lower."""

import logging
import math

import speechbrain as sb
import torch
from speechbrain.dataio.batch import PaddedData

from modules.errors import UserError, out_of_memory
from modules.hindsight import HindsightBrain
from modules.lengths import absolute

logger = logging.getLogger(__name__)


class HalvingBrain(HindsightBrain):
    """Learns by halves from a batch that is too large for the device's memory.

    Losses are means over utterances, so the halves' gradients, weighted by their shares, add up
    to the whole's. The features are the whole's, augmented once; dropout draws anew. Several
    processes exchange gradients in the middle of a backward pass, which one of them cannot repeat
    alone, and CUDA graphs are of whole batches: there the run stops and says what to lower.
    """

    def fit_batch(self, batch):
        """SpeechBrain's, whose forward and backward pass may be taken again in parts."""
        should_step = self.step % self.grad_accumulation_factor == 0
        self.on_fit_batch_start(batch, should_step)
        with self.no_sync(not should_step):
            loss = self.learn(batch)
        vars(batch).pop("features", None)  # for halves; a batch that comes again has its own
        self.gather(loss, should_step)
        if should_step:
            self.optimizers_step()
        if self.unsettled is None:
            loss = loss.cpu()  # now that the device has the step's work
        self.on_fit_batch_end(batch, None, loss, should_step)
        return loss

    def learn(self, batch, share=1.0):
        """Add a batch's gradient, times its share of the whole batch: its loss."""
        noted = len(self.batches), len(self.unalignable)
        earlier = self.gradients_to_keep()
        try:
            return self.learn_at_once(batch, share)
        except RuntimeError as error:
            self.remove_hooks()
            if not out_of_memory(error):
                raise
            if len(batch) == 1 or self.graphs is not None or self.distributed_launch:
                raise UserError(self.too_large(batch)) from error
        # Here the exception is gone, and with it the tensors of the frames that it held.
        if self.device_type == "cuda":
            torch.cuda.empty_cache()
        del self.batches[noted[0] :], self.unalignable[noted[1] :]
        for parameter in self.modules.parameters():
            parameter.grad = earlier.get(parameter)
        if not hasattr(batch, "features"):
            self.forget_statistics()
        logger.warning("%s. This one is taken in halves", self.too_large(batch))
        parts = halves(batch)
        shares = [len(part) / len(batch) for part in parts]
        losses = [self.learn(p, share * s) for p, s in zip(parts, shares, strict=True)]
        return sum(s * loss for s, loss in zip(shares, losses, strict=True))

    def learn_at_once(self, batch, share):
        self.current = batch
        with self.training_ctx:
            outputs = self.compute_forward(batch, sb.Stage.TRAIN)
            loss = self.compute_objectives(outputs, batch, sb.Stage.TRAIN)
        self.settle()  # the last batch, now that the device has work
        scaled = self.scaler.scale(loss * (share / self.grad_accumulation_factor))
        self.check_loss_isfinite(scaled)
        scaled.backward()
        self.remove_hooks()
        return loss.detach()

    def gradients_to_keep(self):
        """Copies of what the step's earlier batches left: {parameter: gradient}."""
        if self.distributed_launch or self.graphs is not None:
            return {}
        kept = [p for p in self.modules.parameters() if p.grad is not None]
        copies = torch._foreach_mul([p.grad for p in kept], 1.0) if kept else []
        return dict(zip(kept, copies, strict=True))

    def evaluate_batch(self, batch, stage):
        if batch.lost:
            return torch.tensor(math.nan)
        try:
            return super().evaluate_batch(batch, stage)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            raise UserError(self.too_large(batch, stage)) from error

    def too_large(self, batch, stage=sb.Stage.TRAIN):
        """What did not fit, and the keys to lower."""
        seconds = batch.sig.data.shape[1] / self.hparams.sample_rate
        what = (
            f"memory ran out on {self.device} in a batch of {len(batch)} utterances of up to "
            f"{seconds:.1f} s"
        )
        if stage == sb.Stage.TEST:
            return f"{what}; lower --test_batch_size or --test_beam_size"
        if stage == sb.Stage.VALID:
            return f"{what}; lower --max_batch_length_val (or --valid_beam_size of S2S)"
        if len(batch) == 1:
            return (
                f"{what}; prepare with a --max_seconds below that, or try --precision bf16 or "
                "--gradient_checkpointing True"
            )
        dynamic = self.hparams.dynamic_batching
        key = "max_batch_length_train" if dynamic else "batch_size"
        return (
            f"{what}; lower --{key} (now {getattr(self.hparams, key)}) and raise "
            "--grad_accumulation_factor by as much"
        )


def halves(batch):
    """The two halves of a batch, each padded to its own longest utterance."""
    middle = (len(batch) + 1) // 2
    return [part_of(batch, range(*ends)) for ends in ((0, middle), (middle, len(batch)))]


def part_of(batch, rows):
    """A batch of these rows; takes along their part of `features`, when it has them."""
    public = {name: value for name, value in vars(batch).items() if not name.startswith("_")}
    features = public.pop("features", None)
    for name in ("unread", "lost"):
        public.pop(name, None)
    part = type(batch)([{k: row_of(v, i) for k, v in public.items()} for i in rows])
    if features is not None:
        x, lengths = features
        views = len(x) // len(batch)
        lengths = lengths[rows.start * views : rows.stop * views]
        part.features = x[rows.start * views : rows.stop * views, : lengths.max()], lengths
    return part


def row_of(values, i):
    if not isinstance(values, PaddedData):
        return values[i]
    lengths = absolute(values.lengths, values.data.shape[1])
    return values.data[i, : lengths[i]]
