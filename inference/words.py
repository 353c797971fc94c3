"""Written pieces and the frames that they take -> words with times."""

from inference.transcript import Word

GAP = "\u2581"  # SentencePiece's sign for the space before a word


def timed_words(pieces, spans, seconds_per_frame, duration):
    """Pieces and their spans, (first frame, frame after the last, posterior) -> words."""

    def time(frame):
        return min(max((frame - 0.5) * seconds_per_frame, 0.0), duration)

    words = []
    for text, members in words_of(pieces):
        parts = [spans[i] for i in members]
        confidence = sum(p for _, _, p in parts) / len(parts)
        words.append(Word(text, time(parts[0][0]), time(parts[-1][1]), confidence))
    return words


def words_of(pieces):
    """Pieces -> [(word, indices of its pieces)]; joined by spaces, the words are the text."""
    words = []
    new = True
    for i, piece in enumerate(pieces):
        text = piece.removeprefix(GAP)
        new = new or text != piece
        if not text:
            continue
        if new:
            words.append((text, [i]))
        else:
            words[-1] = (words[-1][0] + text, [*words[-1][1], i])
        new = False
    return words


def spread(tokens, frames):
    """Spans of tokens that the frames have no room for: even, with posterior 0."""
    width = frames / len(tokens)
    return [(i * width, (i + 1) * width, 0.0) for i in range(len(tokens))]
