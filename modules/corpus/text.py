"""Lines of UTF-8 text with their numbers, and the checks every transcript goes through."""

from collections import defaultdict

from modules.corpus.report import BAD_CHARACTERS, DUPLICATE, EMPTY_TEXT, Fault


def read_lines(path):
    """Yield (line number, text or None, raw bytes) of the non-blank lines; None: not UTF-8.

    Split at line feeds alone: `str.splitlines` would also break a line at U+2028 and the like.
    """
    with open(path, "rb") as file:
        for number, raw in enumerate(file, start=1):
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            raw = raw.strip()
            if not raw:
                continue
            try:
                yield number, raw.decode("utf-8"), raw
            except UnicodeDecodeError:
                yield number, None, raw


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
    if "$" in utterance.text or "$" in utterance.audio:
        return f"SpeechBrain takes '$' in a manifest for a variable: {utterance.text!r}"
    if any("\ud800" <= c <= "\udfff" for c in utterance.text + utterance.audio):
        return f"cannot be written as UTF-8: {utterance.audio!r}, {utterance.text!r}"
    strange = set() if allowed is None else set(utterance.text) - allowed
    return f"{''.join(sorted(strange))!r} in {utterance.text!r}" if strange else ""
