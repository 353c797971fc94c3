"""When each word was said, and how sure the model is: tokens aligned with CTC's posteriors."""

from itertools import pairwise

import torch
from torchaudio.functional import forced_align, merge_tokens

from inference import words
from inference.words import GAP
from modules.tokenizer import SPECIAL, SubwordTokenizer

BLANK = 0


def align(tokens, log_probs, seconds_per_frame, duration, tokenizer):
    """One utterance's words with times.

    tokens : list of ids, none of them special; log_probs (T, V), CTC's

    The best CTC path (Viterbi) of these tokens gives each the frames that it takes; a word goes
    from its first token to its last. Its confidence is the mean over its tokens of the token's
    highest posterior in its frames, so it is in [0, 1].
    Frame t stands for the time around t x seconds_per_frame. More tokens than the frames have
    room for, which a decoder may write, are spread evenly, with confidence 0.
    """
    spans = token_spans(tokens, log_probs)
    if spans is None:
        spans = words.spread(tokens, len(log_probs))
    return timed_words(tokens, spans, seconds_per_frame, duration, tokenizer)


def timed_words(tokens, spans, seconds_per_frame, duration, tokenizer):
    """Tokens and their spans, (first frame, frame after the last, posterior) -> words."""
    return words.timed_words(pieces(tokens, tokenizer), spans, seconds_per_frame, duration)


def token_spans(tokens, log_probs):
    """Tokens -> [(first frame, frame after the last, highest posterior)]; None without room."""
    if not tokens:
        return []
    if len(tokens) + sum(a == b for a, b in pairwise(tokens)) > len(log_probs):
        return None
    # The tokens' columns alone, on the CPU: the aligner knows no MPS.
    columns = sorted({BLANK, *tokens})
    targets = torch.tensor([[columns.index(i) for i in tokens]])
    x = log_probs[:, columns].float().cpu().unsqueeze(0)
    path, scores = forced_align(x, targets, blank=0)
    posteriors = scores[0].exp()
    return [
        (s.start, s.end, min(posteriors[s.start : s.end].max().item(), 1.0))
        for s in merge_tokens(path[0], scores[0])
    ]


def words_of(tokens, tokenizer):
    """Tokens -> [(word, indices of its tokens)]; joined by spaces, the words are the text."""
    return words.words_of(pieces(tokens, tokenizer))


def pieces(tokens, tokenizer):
    """What each token writes, with GAP before a word."""
    if isinstance(tokenizer, SubwordTokenizer):
        return [tokenizer.model.id_to_piece(i) if i >= len(SPECIAL) else "" for i in tokens]
    return [tokenizer.labels[i].replace(" ", GAP) for i in tokens]
