"""CTC search to text: best path, beam search, and SpeechBrain's beam search with a word n-gram."""

import itertools
from importlib.util import find_spec
from pathlib import Path

from speechbrain.decoders.ctc import CTCBeamSearcher, filter_ctc_output

from modules.errors import UserError
from modules.search.ctc_beam import ctc_beam
from modules.search.ngram import WordScorer

# How an n-gram's file begins: ARPA, KenLM's binary, and what KenLM unpacks (gzip, bzip2, xz).
NGRAMS = (b"\\data\\", b"mmap lm http://kheafield.com", b"\x1f\x8b", b"BZh", b"\xfd7zXZ")


def ctc_greedy(log_probs, lengths, blank_index=0, forbidden=(1, 2)):
    """Best path: the best token of each frame, repetitions merged, blanks dropped.

    log_probs (B, T, V), or logits; lengths (B,) in frames -> B lists of token ids. Tokens in
    `forbidden` (bos and eos) never appear.
    """
    best = forbid(log_probs, forbidden).argmax(dim=-1).tolist()
    return [
        filter_ctc_output(path[:length], blank_id=blank_index)
        for path, length in zip(best, lengths.tolist(), strict=True)
    ]


def forbid(log_probs, tokens):
    """Set the log-probability of tokens to minus infinity: (B, T, V) -> (B, T, V)."""
    log_probs = log_probs.clone()
    log_probs[..., list(tokens)] = float("-inf")
    return log_probs


class CTCSearch:
    """CTC beam search to text: on the device, or with a word n-gram by SpeechBrain on the CPU.

    SpeechBrain's `CTCBeamSearcher` counts a prefix that ends in blank and the same one that does
    not as two hypotheses; `ctc_beam` counts one, so it hears more of them with one beam size.

    Arguments
    ---------
    labels : list of str
        Text of each token, " " between words or "\u2581" before them; those of blank and
        `forbidden` do not matter.
    beam_size : int
        Hypotheses kept an utterance.
    beam_prune_logp, token_prune_min_logp : float
        Drop hypotheses this far under the best one; of each frame read only its best token and
        those above this natural log-probability.
    kenlm_model_path : str or None
        Word n-gram, .arpa or .bin. UserError if it is missing, or a .bin without KenLM. An .arpa
        is read in Python where KenLM is not installed.
    alpha, beta : float
        Weight of the n-gram and bonus a word.
    blank_index : int
    forbidden : tuple of int
        Tokens that never appear: bos and eos.
    """

    def __init__(
        self,
        labels,
        beam_size=100,
        beam_prune_logp=-12.0,
        token_prune_min_logp=-1.2,
        kenlm_model_path=None,
        alpha=0.5,
        beta=1.5,
        blank_index=0,
        forbidden=(1, 2),
    ):
        self.labels, self.blank_index, self.forbidden = list(labels), blank_index, forbidden
        self.pruning = {
            "beam_size": beam_size,
            "beam_prune_logp": beam_prune_logp,
            "token_prune_min_logp": token_prune_min_logp,
        }
        self.searcher = None
        if kenlm_model_path is not None:
            check_kenlm(kenlm_model_path)
            check_spelling(kenlm_model_path, self.labels)
            weights = {"alpha": alpha, "beta": beta}
            known = None if kenlm_missing() else kenlm_model_path
            try:
                self.searcher = CTCBeamSearcher(
                    blank_index, self.labels, kenlm_model_path=known, **weights, **self.pruning
                )
            except OSError as error:
                raise UserError(f"the n-gram {known} is none that KenLM reads: {error}") from None
            if known is None:
                self.searcher.lm = WordScorer(kenlm_model_path, **weights)

    def weigh(self, alpha, beta):
        """Give the n-gram other weights."""
        self.searcher.lm.alpha, self.searcher.lm.beta = alpha, beta

    def prune(self, token_prune_min_logp):
        """Read other tokens of each frame."""
        self.pruning["token_prune_min_logp"] = token_prune_min_logp
        if self.searcher is not None:
            self.searcher.token_prune_min_logp = token_prune_min_logp

    def __call__(self, log_probs, lengths):
        """log_probs (B, T, V), lengths (B,) in frames -> B texts, words one space apart.

        ValueError if V is not the number of labels.
        """
        num_labels = len(self.labels)
        if log_probs.shape[-1] != num_labels:
            raise ValueError(f"log_probs has {log_probs.shape[-1]} tokens for {num_labels} labels")
        log_probs = forbid(log_probs.detach().float(), self.forbidden)
        if self.searcher is not None:
            # Utterance by utterance: SpeechBrain's batch call truncates relative lengths.
            return [
                self.searcher.decode_log_probs(x, length)[0].text
                for x, length in zip(log_probs.cpu().numpy(), lengths.tolist(), strict=True)
            ]
        hypotheses = self.tokens(log_probs, lengths)
        texts = ("".join(self.labels[i] for i in ids).replace("\u2581", " ") for ids in hypotheses)
        return [" ".join(text.split()) for text in texts]

    def tokens(self, log_probs, lengths):
        """Without the n-gram: log_probs (B, T, V), lengths (B,) -> B lists of token ids.

        Spaces at the ends are kept, for who searches a recording piece by piece.
        """
        log_probs = forbid(log_probs.detach().float(), self.forbidden)
        return ctc_beam(log_probs, lengths, blank_index=self.blank_index, **self.pruning)


def kenlm_missing():
    """The packages that SpeechBrain reads n-grams with and that are not installed."""
    return [name for name in ("kenlm", "pygtrie") if find_spec(name) is None]


def check_kenlm(path):
    """UserError unless the n-gram file is there, and what reads it."""
    if not Path(path).is_file():
        raise UserError(f"the n-gram {path} is no file; give an .arpa or .bin")
    with open(path, "rb") as file:
        if not file.read(1024).lstrip().startswith(NGRAMS):
            raise UserError(f"{path} holds no n-gram; python -m modules.lm.ngram makes one of text")
    missing = kenlm_missing()
    if missing and Path(path).suffix != ".arpa":
        raise UserError(
            f"the n-gram {path} needs {' and '.join(missing)}; "
            f"run `pip install {' '.join(missing)}`, or give an .arpa file"
        )


def check_spelling(path, labels, words=1000):
    """UserError when an .arpa's first words are mostly none that the labels can write."""
    letters = set("".join(labels)) - {" ", "\u2581"}
    with open(path, "rb") as file:
        if not file.read(1024).lstrip().startswith(b"\\data\\"):
            return  # compressed, or a binary
    with open(path, encoding="utf-8", errors="replace") as file:
        lines = itertools.dropwhile(lambda line: not line.startswith("\\1-grams:"), file)
        columns = (line.split() for line in itertools.islice(lines, 1, words + 1))
        found = [parts[1] for parts in columns if len(parts) > 1 and parts[1][0] != "<"]
    strange = [word for word in found if not letters.issuperset(word)]
    if len(strange) > len(found) / 2:
        raise UserError(
            f"the n-gram {path} has words that the model cannot write, such as {strange[0]!r}; "
            "train it on text that is written as the model's transcripts are (LibriSpeech's are "
            "in capitals)"
        )
