"""Text files to tokens and batches."""

import numpy as np
import torch
from speechbrain.dataio.batch import PaddedBatch
from speechbrain.dataio.sampler import DynamicBatchSampler
from torch.utils.data import Dataset

from modules.data import worker_options
from modules.errors import UserError
from modules.lm.text import read_sentences

PIECE = 10_000  # sentences encoded at once
MOST_UNKNOWN = 0.01  # of the tokens


class Sentences(Dataset):
    """The sentences of texts as tokens, in one array: billions of them fit into memory.

    Those of more than `max_tokens`, ends not counted, are left out, as `too_long` says.
    """

    def __init__(self, texts, tokenizer, bos, eos, max_tokens):
        self.bos, self.eos = bos, eos
        self.words = self.too_long = 0
        pieces, lengths = [np.zeros(0, np.int32)], []
        unknown, example = 0, None
        for sentences in in_pieces(texts):
            encoded = tokenizer.model.encode(sentences)
            kept = [i for i, ids in enumerate(encoded) if len(ids) <= max_tokens]
            self.too_long += len(encoded) - len(kept)
            for text, ids in zip(sentences, encoded, strict=True):
                if 0 in ids:
                    example = example or text
                    unknown += ids.count(0)
            self.words += sum(len(sentences[i].split()) for i in kept)
            lengths += [len(encoded[i]) for i in kept]
            pieces.append(np.array([t for i in kept for t in encoded[i]], np.int32))
        self.tokens, self.ends = np.concatenate(pieces), np.cumsum([0, *lengths])
        if unknown > MOST_UNKNOWN * len(self.tokens):
            raise UserError(
                f"the tokenizer has no unit for {unknown} of {len(self.tokens)} tokens, as in "
                f"{example!r}; write the text as the recogniser's transcripts are (LibriSpeech's "
                "are in capitals), or give the --tokenizer_path of one that learnt such text"
            )

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, i):
        ids = torch.from_numpy(self.tokens[self.ends[i] : self.ends[i + 1]].astype(np.int64))
        return {
            "id": f"sentence {i + 1}",
            "tokens_bos": torch.cat([torch.tensor([self.bos]), ids]),
            "tokens_eos": torch.cat([ids, torch.tensor([self.eos])]),
        }

    @property
    def lengths(self):
        """Tokens of each sentence, its end counted."""
        return (np.diff(self.ends) + 1).tolist()


def in_pieces(texts):
    piece = []
    for sentence in texts:
        piece.append(sentence)
        if len(piece) == PIECE:
            yield piece
            piece = []
    if piece:
        yield piece


class TextBatch(PaddedBatch):
    """SpeechBrain's batch; all text can be read."""

    lost, unread = False, ()


def load_sentences(hparams, key):
    """The sentences of the texts that a key names."""
    sentences = Sentences(
        read_sentences(hparams[key], key),
        hparams["tokenizer"],
        hparams["bos_index"],
        hparams["eos_index"],
        hparams["max_tokens"],
    )
    if not len(sentences):
        raise UserError(
            f"{key}={hparams[key]} has no sentence of {hparams['max_tokens']} tokens or less; "
            "raise --max_tokens"
        )
    return sentences


def train_loader_options(hparams, sentences):
    """DataLoader arguments for training: batches of sentences of like lengths, shuffled."""
    sampler = DynamicBatchSampler(
        sentences,
        hparams["max_batch_tokens"],
        num_buckets=hparams["num_buckets"],
        lengths_list=sentences.lengths,
        shuffle=True,
        batch_ordering="random",
        max_batch_ex=hparams["max_batch_ex"],
        seed=hparams["seed"],
    )
    return {"batch_sampler": sampler, **worker_options(hparams), "collate_fn": TextBatch}


def eval_loader_options(hparams, sentences):
    """DataLoader arguments for validation and test, the longest sentences first."""
    lengths, batches = sentences.lengths, [[]]
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        full = (len(batches[-1]) + 1) * lengths[i] > hparams["max_batch_tokens"]
        if batches[-1] and (full or len(batches[-1]) == hparams["max_batch_ex"]):
            batches.append([])
        batches[-1].append(i)
    options = worker_options(hparams) | {"collate_fn": TextBatch}
    return {"batch_sampler": batches[::-1], **options}
