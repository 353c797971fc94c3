"""Lines of UTF-8 text with their numbers, and the checks every transcript goes through."""

import os
from collections import defaultdict

from modules.corpus.report import BAD_CHARACTERS, DUPLICATE, EMPTY_TEXT, Fault
from modules.errors import UserError

LONGEST = 1 << 20  # bytes of a line


def read_lines(path):
    """Yield (line number, text or None, raw bytes) of the non-blank lines; None: not UTF-8.

    Split at line feeds alone: `str.splitlines` would also break a line at U+2028 and the like.
    UserError when the file cannot be read, or is no text: memory is bounded by LONGEST.
    """
    with open_regular(path) as file:
        for number, raw in enumerate(iter(lambda: file.readline(LONGEST + 1), b""), start=1):
            if len(raw) > LONGEST:
                raise UserError(f"{path}:{number}: a line of over {LONGEST} bytes is no transcript")
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            raw = raw.strip()
            try:
                line = raw.decode("utf-8")
            except UnicodeDecodeError:
                line = None
            if line is None or line.split():  # which knows more blanks than bytes do
                yield number, line, raw


def open_regular(path):
    """Open a file of bytes; UserError for what is none: a pipe would be waited for forever."""
    try:
        if not os.path.isfile(path):
            raise UserError(f"{path} is no file; restore it")
        return open(path, "rb")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); grant access") from error


def check_texts(utterances, allowed_characters):
    """Leave out empty and unexpected text and repeated ids; returns (kept, faults)."""
    kept, faults = [], []
    allowed = None if allowed_characters is None else set(allowed_characters) | {" "}
    places = defaultdict(list)
    for utterance in utterances:
        places[utterance.id].append(utterance)
    for same in places.values():
        first = same[0]
        strange = _strange(first, allowed)
        if len(same) > 1:  # which of them the id means cannot be told: use none
            faults += [Fault(DUPLICATE, u.audio, f"{u.id}, {len(same)} times") for u in same]
        elif not first.text:
            faults.append(Fault(EMPTY_TEXT, first.audio))
        elif strange:
            faults.append(Fault(BAD_CHARACTERS, first.audio, strange))
        else:
            kept.append(first)
    return kept, faults


def _strange(utterance, allowed):
    """What makes text or path unreadable further on; empty if nothing does."""
    written = utterance.id + utterance.audio + utterance.text + utterance.spk_id
    if "$" in written:
        return f"SpeechBrain takes '$' in a manifest for a variable: {utterance.text!r}"
    if any("\ud800" <= c <= "\udfff" for c in written):
        return f"cannot be written as UTF-8: {utterance.audio!r}, {utterance.text!r}"
    if any(c < " " or c == "\x7f" for c in written):
        return f"control characters: {utterance.id!r}, {utterance.text!r}"
    strange = set() if allowed is None else set(utterance.text) - allowed
    return f"{''.join(sorted(strange))!r} in {utterance.text!r}" if strange else ""
