#!/usr/bin/env python3
"""Train an encoder-decoder speech recogniser with joint CTC and attention (Watanabe et al. 2017).

python train_S2S.py hparams/S2S/conmamba_large.yaml --data_folder /data/LibriSpeech
"""

import speechbrain as sb
import torch
from speechbrain.utils.Accuracy import AccuracyStats

from modules import launch
from modules.brain import ASRBrain
from modules.data import add_pipelines, load_datasets, prepare_tokenizer
from modules.language_model import fetch_language_model, load_language_model
from modules.lengths import relative
from modules.recipe import run_recipe


class ASR(ASRBrain):
    """Encoder with a CTC head, decoder with a token head; joint beam search."""

    checkpoint_metric = "ACC"
    higher_is_better = True
    parts = (*ASRBrain.parts, "decoder", "seq_head")

    def compute_forward(self, batch, stage):
        """CTC logits (B, T, V), token log-probabilities (B, U, V), memory, lengths, taps."""
        tokens, token_lengths = self.tokens(batch, "tokens_bos", stage)
        memory, lengths, x, *tapped = self.run_network(
            stage, *self.features(batch, stage), tokens, token_lengths
        )
        x = x[:, : tokens.shape[1]]
        log_probs = self.modules.seq_head(x).log_softmax(dim=-1)
        return self.modules.ctc_head(memory), log_probs, memory, lengths, tapped

    def network(self, features, lengths, tokens, token_lengths):
        """Encoder output (B, T, D), its lengths (B,), decoder output (B, U, D), inner layers'."""
        memory, lengths, *tapped = super().network(features, lengths)
        x, _ = self.modules.decoder(tokens, token_lengths, memory, lengths)
        return memory, lengths, x, *tapped

    def compute_objectives(self, predictions, batch, stage):
        """The weighted sum of both losses; outside training also accuracy and error rates."""
        ctc_logits, log_probs, memory, lengths, tapped = predictions
        targets, target_lengths = self.tokens(batch, "tokens_eos", stage)
        loss_ctc = self.ctc_loss(ctc_logits, lengths, batch, stage, tapped)
        loss_seq = self.hparams.seq_cost(log_probs, targets, target_lengths)
        if stage != sb.Stage.TRAIN:
            self.accuracy.append(log_probs, targets, relative(target_lengths, targets.shape[1]))
            search = self.search_of(stage)
            if search is not None:
                hypotheses, _ = search(memory, lengths)
                self.score(batch, [self.tokenizer.decode(ids) for ids in hypotheses])
        weight = self.hparams.ctc_weight
        return weight * loss_ctc + (1 - weight) * loss_seq

    def search_of(self, stage):
        """The search of a stage; None in the epochs that validate by accuracy alone."""
        if stage == sb.Stage.TEST:
            return self.hparams.test_search
        epoch = self.hparams.epoch_counter.current
        last = epoch == self.hparams.number_of_epochs
        due = epoch % self.hparams.valid_search_interval == 0
        return self.hparams.valid_search if due or last else None

    def on_stage_start(self, stage, epoch=None):
        super().on_stage_start(stage, epoch)
        if stage != sb.Stage.TRAIN:
            self.accuracy = AccuracyStats()

    def validation_statistics(self):
        """Token accuracy always, error rates in the epochs that search."""
        rates = self.error_rates() if self.wer.scores else {}
        return {"ACC": self.accuracy.summarize(), **rates}

    def on_stage_end(self, stage, stage_loss, epoch=None):
        super().on_stage_end(stage, stage_loss, epoch)
        search = None if stage == sb.Stage.TRAIN else self.search_of(stage)
        if search is not None:  # training may need the memory
            search.release()

    def check_start(self):
        """Find out before training whether the language model can be used after it."""
        super().check_start()
        if not self.hparams.no_lm:
            source = self.hparams.pretrained_lm_tokenizer_path
            launch.on_main(fetch_language_model, source, self.hparams.save_folder)
            load_language_model(self.hparams.make_lm, self.hparams.save_folder)

    def prepare_test(self):
        """Add the language model to the test search, unless `no_lm`."""
        if self.hparams.no_lm:
            return
        lm = load_language_model(self.hparams.make_lm, self.hparams.save_folder)
        self.hparams.test_search.use_language_model(
            lm.to(self.device), self.hparams.lm_weight, self.hparams.temperature_lm
        )


def dataio_prepare(hparams):
    """Datasets with audio and subword tokens: (train, valid, {test set: dataset})."""
    train, valid, tests = load_datasets(hparams)
    prepare_tokenizer(hparams, train)
    tokenizer, bos, eos = hparams["tokenizer"], hparams["bos_index"], hparams["eos_index"]
    for dataset in (train, valid, *tests.values()):
        tokenizer.check(item["wrd"] for item in dataset.data.values())

    def text_pipeline(wrd):
        ids = tokenizer.encode(wrd)
        yield torch.LongTensor(ids)
        yield torch.LongTensor([bos, *ids])
        yield torch.LongTensor([*ids, eos])

    keys = ["tokens", "tokens_bos", "tokens_eos"]
    add_pipelines(hparams, train, valid, tests, text_pipeline, keys)
    return train, valid, tests


def main(argv):
    run_recipe(argv, "train_S2S.py", ASR, dataio_prepare)


if __name__ == "__main__":
    launch.run(main, "train_S2S.py", "hparams/S2S/conmamba_large.yaml")
