"""The Brain of language models: perplexities, and the training guarantees of recognisers."""

import math

import speechbrain as sb
import torch
from speechbrain.utils.distributed import if_main_process
from torch.nn import functional as F  # noqa: N812

from modules.lengths import absolute
from modules.lm.data import eval_loader_options
from modules.tensors import save_tensors
from modules.training import TrainingBrain


class LMBrain(TrainingBrain):
    """Predicts the next token; checkpoints are ranked by the perplexity of the dev text."""

    checkpoint_metric = "PPL"
    parts = ("lm",)

    # ---- One batch ----

    def compute_forward(self, batch, stage):
        """Logits of the next tokens (B, U, V)."""
        return self.modules.lm(batch.tokens_bos.data)

    def compute_objectives(self, logits, batch, stage):
        """Cross entropy, summed over each sentence and averaged over the batch."""
        targets, lengths = batch.tokens_eos
        smoothing = self.hparams.label_smoothing if stage == sb.Stage.TRAIN else 0.0
        logits = logits.float().transpose(1, 2)
        # Padding, 0, is never a target: SentencePiece gives it to characters that it never saw.
        counted = absolute(lengths, targets.shape[1]).unsqueeze(1) > torch.arange(
            targets.shape[1], device=targets.device
        )
        loss = F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
        total = (loss * counted).sum()
        if stage != sb.Stage.TRAIN:
            self.total += total.item()
            self.number += int(counted.sum())
        return total / len(targets)

    def fit_batch(self, batch):
        return super().fit_batch(batch.to(self.device))

    def evaluate_batch(self, batch, stage):
        return super().evaluate_batch(batch.to(self.device), stage)

    # ---- Text has no feature statistics, and batches of tokens ----

    def on_fit_batch_start(self, batch, should_step):
        pass

    def restore_statistics(self):
        pass

    def forget_statistics(self):
        pass

    def too_large(self, batch, stage=sb.Stage.TRAIN):
        """What did not fit, and the keys to lower."""
        longest = batch.tokens_bos.data.shape[1]
        what = (
            f"memory ran out on {self.device} in a batch of {len(batch)} sentences of up to "
            f"{longest} tokens"
        )
        if len(batch) == 1:
            return f"{what}; lower --max_tokens below that, or try --precision bf16"
        return (
            f"{what}; lower --max_batch_tokens (now {self.hparams.max_batch_tokens}) and raise "
            "--grad_accumulation_factor by as much"
        )

    # ---- Stages ----

    def on_stage_start(self, stage, epoch=None):
        super().on_stage_start(stage, epoch)
        self.total, self.number = 0.0, 0

    def perplexity(self):
        return math.exp(min(self.total / max(self.number, 1), 700.0))

    def validation_statistics(self):
        return {"PPL": self.perplexity()}

    def test(self, datasets):
        """{name: Sentences} -> {name: {"PPL", "PPL word", ...}} of the average of the best."""
        for name, sentences in datasets.items():
            options = eval_loader_options(vars(self.hparams), sentences)
            loss = self.evaluate(sentences, test_loader_kwargs=options)
            words = sentences.words + len(sentences)  # an end of a sentence is one, as in n-grams
            self.results[name] = {
                "PPL": self.perplexity(),
                "PPL word": math.exp(min(self.total / words, 700.0)),
                "words": sentences.words,
                "tokens": self.number,
                "too long": sentences.too_long,
            }
            self.loggers.log_stats(
                {"text": name, "epochs": self.hparams.epoch_counter.current},
                test_stats={"loss": loss, **self.results[name]},
            )
        return self.results

    def write_weights(self, path):
        """The weights that are evaluated, for the searches of recognisers."""
        if if_main_process():
            save_tensors(self.hparams.model.state_dict(), path)
