"""What the demo corpus says: digit strings, and sentences of a small grammar (about 60 words)."""

DIGITS = ["ZERO", "ONE", "TWO", "THREE", "FOUR", "FIVE", "SIX", "SEVEN", "EIGHT", "NINE"]

WORDS = {
    "person": ["ANNA", "PETER", "MARY", "TOM", "WE", "THEY"],
    "verb": ["FOUND", "TOOK", "SAW", "LEFT", "HID", "MOVED"],
    "colour": ["RED", "OLD", "SMALL", "GREEN", "HEAVY"],
    "thing": ["BOOK", "BOAT", "LAMP", "KEY", "STONE", "COAT", "APPLE", "CLOCK"],
    "where": ["NEAR", "UNDER", "BEHIND"],
    "place": ["RIVER", "GARDEN", "BRIDGE", "KITCHEN", "TOWER", "MARKET"],
    "when": ["TODAY", "YESTERDAY", "IN THE MORNING"],
    "order": ["OPEN", "CLOSE", "BRING"],
    "end": ["NOW", "PLEASE"],
}

PATTERNS = [
    "person verb THE colour thing where THE place",
    "person verb A colour thing when",
    "person AND person verb THE thing where THE place",
    "person verb THE thing AND A colour thing",
    "order THE colour thing where THE place end",
    "order THE thing AND THE colour thing end",
    "WHERE IS THE colour thing AND THE thing",
    "THE colour thing WAS where THE place when",
    "THE thing IS where THE colour place",
]


def sentence(rng, digit_fraction):
    """One random line of text, 3 to 10 words; `digit_fraction` of them are digit strings."""
    if rng.random() < digit_fraction:
        return " ".join(rng.choices(DIGITS, k=rng.randint(3, 8)))
    slots = rng.choice(PATTERNS).split()
    return " ".join(rng.choice(WORDS[slot]) if slot in WORDS else slot for slot in slots)


def split_sentences(rng, sizes, digit_fraction):
    """{split: count} -> {split: lines}; no line of one split is in another.

    Small splits are drawn first: a large one would leave them no short line.
    """
    taken, lines = set(), {}
    for split in sorted(sizes, key=sizes.get):
        lines[split] = []
        while len(lines[split]) < sizes[split]:
            line = sentence(rng, digit_fraction)
            if line not in taken:
                lines[split].append(line)
        taken |= set(lines[split])
    return lines
