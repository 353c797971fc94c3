"""ASRBrain: what training with CTC and with S2S have in common."""

import logging
import time
from pathlib import Path

import speechbrain as sb
import torch
from speechbrain.utils.distributed import if_main_process
from speechbrain.utils.metric_stats import ErrorRateStats

from modules.compilation import compile_layers, graphs_for
from modules.ema import WeightAverage
from modules.errors import UserError
from modules.features import standardize
from modules.heads import learn_biases_by_products
from modules.lengths import absolute, relative, zero_padding
from modules.losses import consistency_loss, too_few_frames
from modules.training import TrainingBrain
from modules.transfer import Transfer
from modules.whole import whole

logger = logging.getLogger(__name__)


class ASRBrain(TrainingBrain):
    """Reads audio, encodes, and scores word errors, by which checkpoints are ranked.

    A subclass gives `compute_forward`, `compute_objectives` and `prepare_test`.
    """

    checkpoint_metric = "WER"
    parts = ("normalize", "frontend", "encoder", "ctc_head")

    def __init__(self, hparams, run_opts):
        super().__init__(hparams, run_opts)
        # Statistics are read onto the device that the features are on.
        self.hparams.normalize.to(self.device)
        self.tokenizer = hparams["tokenizer"]
        self.graphs = self.evaluation_graphs = self.prepared = None
        self.on_device = Transfer(self.device)
        self.ema = WeightAverage(hparams["model"], getattr(self.hparams, "ema_decay", 0.0))
        self.checkpointer.add_recoverable("ema", self.ema)

    # ---- The network ----

    def features(self, batch, stage):
        """Waveforms to what the network gets: (B, T, n_mels), lengths (B,) in frames."""
        if hasattr(batch, "features"):  # a part of a batch that was too large
            return batch.features
        wavs, relative_lengths = batch.sig
        samples = absolute(relative_lengths, wavs.shape[1])
        if stage == sb.Stage.TRAIN:
            for augment in (self.hparams.reverberate, self.hparams.add_noise):
                wavs, _ = augment(wavs, relative_lengths)
            wavs = zero_padding(wavs, samples)
        features, lengths = self.hparams.compute_features(wavs, samples)
        # Only training updates the statistics, and reads the epoch to know when to stop.
        epoch = self.hparams.epoch_counter.current
        features = standardize(self.modules.normalize, features, lengths, epoch)
        if stage == sb.Stage.TRAIN:
            features, lengths = (
                x.repeat_interleave(self.hparams.views, dim=0) for x in (features, lengths)
            )
            features, _ = self.hparams.fea_augment(features, relative(lengths, features.shape[1]))
            batch.features = features, lengths
        return features, lengths

    def encode(self, features, lengths):
        """Features to encoder output: (B, T, D), lengths (B,) in frames."""
        if self.evaluation_graphs is None or torch.is_grad_enabled():
            return self.layers(features, lengths)
        frames = -(-features.shape[1] // self.modules.frontend.subsampling)
        x, lengths = self.evaluation_graphs(features, lengths)
        return x[:, :frames], lengths

    def layers(self, features, lengths, **options):
        return self.modules.encoder(*self.modules.frontend(features, lengths), **options)

    def network(self, features, lengths):
        """All layers between the features and the heads: tensors to a tuple of tensors.

        (B, T, D), lengths (B,), and in training the outputs of `inter_ctc_layers`.
        """
        if not (torch.is_grad_enabled() and self.hparams.inter_ctc_layers):
            return self.encode(features, lengths)
        x, lengths, tapped = self.layers(features, lengths, taps=self.hparams.inter_ctc_layers)
        return x, lengths, *tapped

    def run_network(self, stage, *inputs):
        """`network`, in training by CUDA graphs when there are any; may give more padding."""
        if stage != sb.Stage.TRAIN or self.graphs is None:
            return self.network(*inputs)
        return self.graphs(*inputs)

    def tokens(self, batch, name, stage):
        """Token ids (B, U) and their lengths (B,) of a batch's key, in training for each view."""
        ids, relative_lengths = batch[name]
        found = ids, absolute(relative_lengths, ids.shape[1])
        views = self.hparams.views if stage == sb.Stage.TRAIN else 1
        return tuple(x.repeat_interleave(views, dim=0) for x in found)

    def ctc_loss(self, logits, lengths, batch, stage, tapped=()):
        """The CTC loss of logits (B, T, V), in training with what is to help it.

        That are the losses of layers further down, tapped [(B, T, D), ...] (InterCTC, Lee &
        Watanabe 2021), and the distance between views (CR-CTC). Training notes who has too few
        frames.
        """
        tokens, token_lengths = self.tokens(batch, "tokens", stage)
        targets = tokens, lengths, token_lengths
        heads = [logits, *map(self.modules.ctc_head, tapped)]
        # In one call: in each of PyTorch's CTC the host waits for the device.
        losses = self.hparams.ctc_cost(
            *(stack(x) for x in (heads, *([x] * len(heads) for x in targets))), reduction="none"
        )
        loss, *others = losses.unflatten(0, (len(heads), -1)).mean(dim=1)
        if stage != sb.Stage.TRAIN:
            return loss
        short = too_few_frames(tokens, lengths, token_lengths)
        self.unalignable.append((short[:: self.hparams.views], batch.id))
        if others:
            weight = self.hparams.inter_ctc_weight
            loss = (1 - weight) * loss + weight * sum(others) / len(others)
        if self.hparams.consistency_weight:
            loss = loss + self.hparams.consistency_weight * consistency_loss(logits, lengths)
        return loss

    # ---- Error rates ----

    def on_stage_start(self, stage, epoch=None):
        """Fresh metrics for validation and test."""
        self.unread = []
        super().on_stage_start(stage, epoch)
        if stage != sb.Stage.TEST:  # for which the checkpoints' average is loaded
            self.ema.show(stage == sb.Stage.VALID)
        if self.prepared is not None:
            self.prepared.forget()
        if stage != sb.Stage.TRAIN:
            self.wer = ErrorRateStats()
            self.cer = ErrorRateStats(split_tokens=True)
            self.search_seconds = self.audio_seconds = 0.0

    def score(self, batch, texts):
        """Add the transcripts of a batch to the word and character error rates."""
        for metric in (self.wer, self.cer):
            metric.append(batch.id, [t.split() for t in texts], [t.split() for t in batch.wrd])

    def evaluate_batch(self, batch, stage):
        """SpeechBrain's, on the right device and with a stopwatch for the real-time factor."""
        self.note_unread(batch.unread)
        batch = self.on_device(batch)
        started = time.perf_counter()
        loss = super().evaluate_batch(batch, stage)
        if batch.lost:
            return loss
        self.search_seconds += time.perf_counter() - started
        samples = absolute(batch.sig.lengths, batch.sig.data.shape[1]).sum()
        self.audio_seconds += float(samples) / self.hparams.sample_rate
        return loss

    def error_rates(self):
        return {"WER": self.wer.summarize("error_rate"), "CER": self.cer.summarize("error_rate")}

    # ---- Optimisation ----

    def _compile(self):
        """--compile: SpeechBrain's option, which here compiles encoder and decoder layer by layer.

        With --compile_mode reduce-overhead a single process trains by CUDA graphs too.
        """
        if not self.compile or self.compile_module_keys:
            super()._compile()
            return
        compile_layers(self.modules.encoder)
        if "decoder" in self.modules:
            compile_layers(self.modules.decoder)
        learn_biases_by_products(self.modules)
        if self.compile_mode == "reduce-overhead":
            self.graphs, self.evaluation_graphs, self.prepared = graphs_for(self)

    def check_loss_isfinite(self, loss):
        super().check_loss_isfinite(loss)
        if self.graphs is not None:
            self.graphs.discard = not (self.looks_back() or self.batches[-1][0])

    def gradients(self):
        """All gradients; of a step by graphs they lie in one tensor."""
        if self.graphs is not None and self.sum is not None:
            return [self.sum.flat]
        together = self.graphs is not None and self.graphs.attached()
        return [self.graphs.flat] if together else super().gradients()

    def init_optimizers(self):
        super().init_optimizers()
        if self.ema.decay and self.scaler.is_enabled():  # it alone knows which steps are taken
            self.optimizer.register_step_post_hook(self.ema.update)

    def stepped(self):
        if self.ema.decay and not self.scaler.is_enabled():
            self.ema.update()

    def _fit_train(self, train_set, epoch, enable):
        train_set.dataset.set_epoch(epoch)
        super()._fit_train(train_set, epoch, enable)

    def fit_batch(self, batch):
        self.note_unread(batch.unread)
        return super().fit_batch(self.on_device(batch))

    # ---- Batches ----

    def make_dataloader(self, *args, **options):
        """SpeechBrain's; for a GPU batches are pinned, in pages that it can read by itself."""
        return super().make_dataloader(*args, **options, pin_memory=self.on_device.pins)

    # ---- Files that cannot be read ----

    def note_unread(self, unread):
        """Name the utterances that a batch has to do without: [(id, why)]."""
        for name, why in unread:
            logger.warning("%s cannot be read and is left out: %s", name, why)
        self.unread += unread

    def count_unread(self):
        """How many there were in all processes; the main one's log names the others' too."""
        first, *others = self.of_ranks(self.unread)
        if if_main_process():
            for unread in others:
                self.note_unread(unread)
        return len(first) + sum(map(len, others))

    def nothing_read(self, stage):
        """UserError where no file of a validation or test could be read: there is no error rate."""
        if stage == sb.Stage.TEST:
            raise UserError(
                f"no file of the test set {self.test_set} can be read, log.txt says why; bring "
                "them back, or name other --test_splits"
            )
        self.save_before_validation()
        raise UserError(
            "no file of dev_splits can be read, log.txt says why; bring them back, and the same "
            f"command goes on with the validation: {self.checkpointer.checkpoints_dir} has the "
            "training up to it"
        )

    # ---- Stages ----

    def on_stage_end(self, stage, stage_loss, epoch=None):
        """After a test write its error rates."""
        if stage != sb.Stage.TRAIN and any(self.sum_of_ranks(not self.audio_seconds)):
            self.nothing_read(stage)
        super().on_stage_end(stage, stage_loss, epoch)
        if stage == sb.Stage.TEST:
            self.write_results(stage_loss)

    def training_statistics(self):
        self.report_unalignable()
        if self.graphs is not None:
            self.graphs.report()
        unread = self.count_unread()
        return super().training_statistics() | ({"unread files": unread} if unread else {})

    def validation_statistics(self):
        return self.error_rates()

    def _save_intra_epoch_ckpt(self):
        with self.ema.showing():
            super()._save_intra_epoch_ckpt()

    def write_results(self, loss):
        """Write `wer_<test set>.txt` and remember the numbers for the summary."""
        rates = self.error_rates()
        rates["RTF"] = self.search_seconds / max(self.audio_seconds, 1e-9)
        if self.unread:
            rates["unread files"] = len(self.unread)
        self.results[self.test_set] = rates
        self.loggers.log_stats(
            {"test set": self.test_set, "epochs": self.hparams.epoch_counter.current},
            test_stats={"loss": loss, **rates},
        )
        if if_main_process():
            path = Path(self.hparams.output_folder) / f"wer_{self.test_set}.txt"
            with whole(path) as beside, open(beside, "w", encoding="utf-8") as f:
                self.wer.write_stats(f)

    # ---- Evaluating ----

    def test(self, datasets, loader_options):
        """Evaluate every test set: {name: dataset} -> {name: {"WER", "CER", "RTF"}}."""
        for name, dataset in datasets.items():
            self.test_set = name
            self.evaluate(dataset, test_loader_kwargs=loader_options(dataset))
        return self.results


def stack(tensors):
    """Batches one after the other; a single one is not copied."""
    return torch.cat(tensors) if len(tensors) > 1 else tensors[0]
