"""Text to token ids and back: characters for CTC, SentencePiece units for S2S.

Ids 0, 1, 2 are blank (and padding), bos and eos in both.
"""

import io
import re

import sentencepiece

from modules.errors import UserError
from modules.whole import whole

SPECIAL = ("<blank>", "<bos>", "<eos>")


class CharacterTokenizer:
    """One token a character.

    Arguments
    ---------
    alphabet : str
        The characters, in the order of their ids from 3 up.
    """

    def __init__(self, alphabet):
        if len(set(alphabet)) != len(alphabet) or not alphabet:
            raise ValueError(f"alphabet={alphabet!r} must list every character once")
        self.labels = [*SPECIAL, *alphabet]
        self.ids = {character: i for i, character in enumerate(self.labels)}

    def __len__(self):
        return len(self.labels)

    def encode(self, text):
        """Ids of a transcript; UserError naming a character outside the alphabet."""
        try:
            return [self.ids[character] for character in text]
        except KeyError as unknown:
            alphabet = "".join(self.labels[len(SPECIAL) :])
            raise UserError(
                f"the character {unknown} in {text!r} is not in the alphabet {alphabet!r}; "
                "clean the transcripts, or set --alphabet and --output_neurons "
                f"({len(SPECIAL)} more than the alphabet's length)"
            ) from None

    def check(self, texts):
        """UserError for the first transcript that has a character outside the alphabet."""
        known = set(self.ids)
        for text in texts:
            if not known.issuperset(text):
                self.encode(text)

    def decode(self, ids):
        """Text of ids, without blank, bos and eos."""
        return "".join(self.labels[i] for i in ids if i >= len(SPECIAL))


class SubwordTokenizer:
    """SentencePiece units, loaded from a file or trained from transcripts.

    Arguments
    ---------
    vocab_size : int
        Units, the three special ones included.
    model_type : str
        "unigram", "bpe", "char" or "word".
    """

    def __init__(self, vocab_size, model_type="unigram"):
        if model_type not in ("unigram", "bpe", "char", "word"):
            raise ValueError(f"token_type={model_type!r} is unknown; use unigram, bpe, char, word")
        self.vocab_size, self.model_type = vocab_size, model_type
        self.model = None

    def __len__(self):
        return self.model.vocab_size()

    def load(self, path):
        """Read a SentencePiece model; UserError when it is none, or of another size."""
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"{path} is not a SentencePiece model ({error}); give a folder that holds one as "
                "tokenizer.ckpt, or remove the file to train a new one"
            ) from None
        if len(self) != self.vocab_size:
            raise UserError(
                f"{path} has {len(self)} units and output_neurons is {self.vocab_size}; "
                f"set --output_neurons {len(self)}, or another --output_folder"
            )

    def train(self, texts, path):
        """Train on transcripts, write the model to `path` at once, and load it.

        UserError, with nothing written, when the text is too small for so many units.
        """
        model, texts = io.BytesIO(), list(texts)
        characters = len({"\u2581"}.union(*(text.replace(" ", "") for text in texts)))
        if self.model_type == "char" and characters + len(SPECIAL) > self.vocab_size:
            raise UserError(self._other_size(characters + len(SPECIAL)))
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(texts),
                model_writer=model,
                vocab_size=self.vocab_size,
                model_type=self.model_type,
                character_coverage=1.0,
                # Text is taken as it is: what Unicode calls equal would be scored as wrong.
                normalization_rule_name="identity",
                # Id 0 is CTC's blank and the padding too: no character is ever unknown.
                unk_id=0,
                bos_id=1,
                eos_id=2,
                pad_id=-1,
                minloglevel=2,
            )
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip() or str(error)
            most = re.search(r"value <= (\d+)", reason)
            if most:
                reason, remedy = f"they allow {most[1]} units", f"set --output_neurons {most[1]}"
            else:
                remedy = "set --output_neurons to what the text allows"
            raise UserError(
                f"no {self.model_type} tokenizer of {self.vocab_size} units can be trained from "
                f"these transcripts: {reason}; {remedy}"
            ) from None
        units = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).vocab_size()
        if units != self.vocab_size:  # char and word: no more than the text has
            raise UserError(self._other_size(units))
        with whole(path) as beside:
            beside.write_bytes(model.getvalue())
        self.load(path)

    def _other_size(self, units):
        return (
            f"these transcripts have {units} units of token_type={self.model_type}, and "
            f"output_neurons is {self.vocab_size}; set --output_neurons {units}"
        )

    @property
    def labels(self):
        """Text of each token, "\u2581" where a word begins."""
        return [self.model.id_to_piece(i) for i in range(len(self))]

    def check(self, texts):
        """UserError for the first transcript with something that has no unit."""
        for text in texts:
            if 0 in self.encode(text):
                raise UserError(
                    f"{text!r} holds what the {self.model_type} tokenizer of {len(self)} units "
                    "has no unit for; write the transcripts as those that it was trained on "
                    "(LibriSpeech's are in capitals), or use --token_type unigram, bpe or char, or "
                    "other --dev_splits and --test_splits"
                )

    def encode(self, text):
        """Ids of a transcript."""
        return self.model.encode(text)

    def decode(self, ids):
        """Text of ids, without blank, bos and eos."""
        return self.model.decode([i for i in ids if i >= len(SPECIAL)])
