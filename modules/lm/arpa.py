"""ARPA files: written, read, and asked for the probability of a word after others."""

import math

from modules.errors import UserError
from modules.lm.kneser_ney import BOS, EOS, UNKNOWN
from modules.whole import whole


def write_arpa(tables, path):
    """Write [{n-gram: (probability, backoff)} of 1, 2, ... words]; whole or not at all."""
    with whole(path) as beside, open(beside, "w", encoding="utf-8") as file:
        file.write("\\data\\\n")
        file.writelines(f"ngram {n}={len(table)}\n" for n, table in enumerate(tables, start=1))
        for n, table in enumerate(tables, start=1):
            file.write(f"\n\\{n}-grams:\n")
            last = n == len(tables)
            for ngram, (probability, backoff) in table.items():
                end = "" if last else f"\t{math.log10(backoff):.7g}"
                file.write(f"{math.log10(probability):.7g}\t{' '.join(ngram)}{end}\n")
        file.write("\n\\end\\\n")


class Arpa:
    """A word n-gram in memory.

    order : words of the longest n-gram
    words : all that it knows, the special ones not counted
    """

    def __init__(self, path):
        self.ngrams, self.order = {}, 0
        try:
            with open(path, encoding="utf-8") as file:
                self.read(file)
        except (OSError, ValueError, IndexError) as error:
            raise UserError(f"{path} is no ARPA file: {error}") from None
        self.words = {ngram[0] for ngram in self.ngrams if len(ngram) == 1} - {BOS, EOS, UNKNOWN}
        if not self.words:
            raise UserError(f"{path} is no ARPA file: it holds no words")

    def read(self, file):
        for line in file:
            if line.startswith("\\"):
                order = line[1:].partition("-grams:")[0]
                self.order = int(order) if order.isdigit() else self.order
            elif self.order and (fields := line.split()):
                ngram = tuple(fields[1 : 1 + self.order])
                backoff = float(fields[1 + self.order]) if len(fields) > 1 + self.order else 0.0
                self.ngrams[ngram] = float(fields[0]), backoff

    def score(self, context, word):
        """Words before, the next -> its log10 probability, the words that the next depends on."""
        if word not in self.words and word != EOS:
            word = UNKNOWN
        total = 0.0
        for start in range(len(context) + 1):
            if found := self.ngrams.get((*context[start:], word)):
                total += found[0]
                break
            total += self.ngrams.get(context[start:], (0.0, 0.0))[1]
        else:
            total += -100.0  # KenLM's for an unknown word that the file does not have
        longer = (*context, word)
        return total, longer[max(0, len(longer) - self.order + 1) :]

    def perplexity(self, sentences):
        """-> perplexity a word, ends of sentences counted, unknown words not; number of unknown."""
        total, number, unknown = 0.0, 0, 0
        for sentence in sentences:
            context = (BOS,)
            for word in (*sentence.split(), EOS):
                score, context = self.score(context, word)
                if word == EOS or word in self.words:
                    total, number = total + score, number + 1
                else:
                    unknown += 1
        return 10 ** (-total / max(number, 1)), unknown
