"""Who reads what: texts shared out over readers and chapters."""

from demo.acoustics import SAMPLE_RATE, Conditions
from demo.reading import Chapter, recordings
from modules.errors import UserError

UTTERANCES = 50  # at most, a chapter: what a killed run has to say again
SAMPLE = 40  # readers


def mean_seconds(texts, readers, apart):
    """How long an utterance will be: some readers say three texts each, and the others by those.

    Letters, and the readers' own pace, are known of all; only what remains is measured.
    """
    sample = readers[:: max(1, len(readers) // SAMPLE)][:SAMPLE]
    samples = expected = 0
    for i, reader in enumerate(sample):
        part = tuple(texts[i :: len(sample)][:3])
        chapter = Chapter("", 1, reader, part, Conditions(0, 0, 0), apart)
        samples += sum(map(len, recordings(chapter)))
        expected += sum(map(len, part)) * _pace(reader)
    letters = sum(map(len, texts)) / len(texts)
    pace = sum(map(_pace, readers)) / len(readers)
    return samples / SAMPLE_RATE / expected * letters * pace


def _pace(reader):
    return reader.size / reader.rate


def share_out(texts, readers, folder, conditions, apart):
    """Chapters below `folder`, by reader; UserError when there is no text for everybody."""
    if len(texts) < len(readers):
        raise UserError(
            f"speakers={len(readers)} are more than the utterances that the hours have room for, "
            f"about {len(texts)}; give more hours or fewer speakers"
        )
    chapters = []
    for i, reader in enumerate(readers):
        own = texts[i * len(texts) // len(readers) : (i + 1) * len(texts) // len(readers)]
        for number, start in enumerate(range(0, len(own), UTTERANCES), 1):
            path = str(folder / str(reader.id) / str(number))
            part = tuple(own[start : start + UTTERANCES])
            chapters.append(Chapter(path, number, reader, part, conditions, apart))
    return chapters
