#!/usr/bin/env python3
"""Train a speech recogniser with CTC over characters (Graves et al. 2006).

python train_CTC.py hparams/CTC/conmamba_large.yaml --data_folder /data/LibriSpeech
"""

import speechbrain as sb
import torch

from modules import launch
from modules.brain import ASRBrain
from modules.data import add_pipelines, load_datasets, prepare_tokenizer
from modules.errors import UserError
from modules.recipe import run_recipe
from modules.search import CTCSearch, ctc_greedy
from modules.search.ctc import check_kenlm
from modules.tokenizer import SubwordTokenizer


class ASR(ASRBrain):
    """Encoder and a linear head; greedy in validation, beam search in test."""

    def compute_forward(self, batch, stage):
        """Logits (B, T, V), lengths (B,) in frames, what inner layers gave."""
        x, lengths, *tapped = self.run_network(stage, *self.features(batch, stage))
        return self.modules.ctc_head(x), lengths, tapped

    def compute_objectives(self, predictions, batch, stage):
        """The CTC loss; outside training also the error rates."""
        logits, lengths, tapped = predictions
        loss = self.ctc_loss(logits, lengths, batch, stage, tapped)
        if stage == sb.Stage.VALID:
            hypotheses = ctc_greedy(logits.log_softmax(dim=-1), lengths)
            self.score(batch, [self.tokenizer.decode(ids) for ids in hypotheses])
        elif stage == sb.Stage.TEST:
            self.score(batch, self.test_search(logits.log_softmax(dim=-1), lengths))
        return loss

    def check_start(self):
        """Find out before training whether the n-gram model can be used after it."""
        super().check_start()
        if not self.hparams.no_lm:
            if self.hparams.kenlm_model_path is None:
                raise UserError(
                    "no_lm is False but no n-gram model is given; set --kenlm_model_path to an "
                    ".arpa or .bin file, or --no_lm True"
                )
            check_kenlm(self.hparams.kenlm_model_path)

    def prepare_test(self):
        """Build the beam search, with the n-gram model when there is one."""
        self.test_search = CTCSearch(
            self.tokenizer.labels,
            beam_size=self.hparams.test_beam_size,
            beam_prune_logp=self.hparams.beam_prune_logp,
            token_prune_min_logp=self.hparams.token_prune_min_logp,
            kenlm_model_path=None if self.hparams.no_lm else self.hparams.kenlm_model_path,
            alpha=self.hparams.lm_weight,
            # Files of before the key was there have the shipped files' bonus.
            beta=getattr(self.hparams, "word_bonus", 1.5),
        )


def dataio_prepare(hparams):
    """Datasets with audio and character tokens: (train, valid, {test set: dataset})."""
    train, valid, tests = load_datasets(hparams)
    tokenizer = hparams["tokenizer"]
    if isinstance(tokenizer, SubwordTokenizer):
        prepare_tokenizer(hparams, train)
    for dataset in (train, valid, *tests.values()):
        tokenizer.check(item["wrd"] for item in dataset.data.values())

    def text_pipeline(wrd):
        return torch.LongTensor(tokenizer.encode(wrd))

    add_pipelines(hparams, train, valid, tests, text_pipeline, ["tokens"])
    return train, valid, tests


def main(argv):
    run_recipe(argv, "train_CTC.py", ASR, dataio_prepare)


if __name__ == "__main__":
    launch.run(main, "train_CTC.py", "hparams/CTC/conmamba_large.yaml")
