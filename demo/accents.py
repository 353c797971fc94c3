"""Accents of English: eSpeak's own, and what foreign readers make of its phonemes.

Coarse on purpose, as a recogniser needs variety, not portraits: a reader has some of the rules of
an accent, so that hardly two sound the same.
"""

from demo.espeak import SEPARATOR

# eSpeak's voices of English besides en and en-us.
REGIONAL = (
    "en-us-nyc",
    "en-029",
    "en-gb-scotland",
    "en-gb-x-rp",
    "en-gb-x-gbclan",
    "en-gb-x-gbcwmd",
)
DEVOICED = "b#>p d#>t g#>k v#>f z#>s dZ#>tS"
TRILLED = "r>R r->R"
# a>b: a becomes b; a#>b: at the end of a word only; nothing after > leaves it out.
ACCENTS = {
    "native": "",
    "german": f"T>s D>z w>v V>a a>E 0>O oU>o: eI>e: O@>o: {DEVOICED}",
    "dutch": f"T>t D>d z>s g>k a>E V>a oU>o: eI>e: S>s {DEVOICED}",
    "french": f"T>s D>z h> I>i I2>i U>u V>a oU>o eI>e tS>S dZ>Z 3:>E {TRILLED}",
    "spanish": f"T>t D>d z>s v>b S>tS I>i I2>i U>u V>a a>aa @>e i:>i u:>u j>dZ {TRILLED}",
    "italian": f"T>t D>d h> I>i I2>i U>u V>a @>e a>E 0>O oU>o eI>e {TRILLED}",
    "slavic": f"T>s D>z w>v h>x I>i a>E V>a 3:>E oU>o eI>e N>n {TRILLED} {DEVOICED}",
    "indian": "T>t D>d w>v 0>A: 3>V oU>o: eI>e: V>@ 3:>V z>s a>E r>R",
    "nordic": "w>v z>s Z>S dZ>j T>t D>d V>O tS>S oU>u: z#>s",
    "asian": "T>s D>d r>l r->l v>w z>s d#>t b#>p g#>k Z>S I>i 0>O l#> @L>o",
}
STRESS = "',%="


def draw_rules(rng, accent):
    """Some of an accent's rules, as pairs (phoneme, replacement): a faint or a strong accent."""
    strength = rng.uniform(0.3, 1)
    rules = [tuple(rule.split(">")) for rule in ACCENTS[accent].split()]
    return tuple(rule for rule in rules if rng.random() < strength)


def pronounce(clauses, rules):
    """Clauses of phonemes, as `Espeak.phonemes` gives -> text for `Espeak.say`."""
    rules = dict(rules)
    spoken = (" ".join(_word(word, rules) for word in clause) for clause in clauses)
    return ", ".join(f"[[{clause}]]" for clause in spoken if clause)


def _word(word, rules):
    sounds = word.split(SEPARATOR)
    pauses = [sound for sound in sounds if sound.startswith("_")]
    sounds = [sound for sound in sounds if not sound.startswith("_")]
    for i, sound in enumerate(sounds):
        bare = sound.lstrip(STRESS)
        changed = rules.get(bare, bare)
        if i == len(sounds) - 1:
            changed = rules.get(f"{bare}#", changed)
        # A dropped consonant bears no stress, and a bare stress mark would be no phoneme.
        sounds[i] = sound[: len(sound) - len(bare)] + changed if changed else ""
    return SEPARATOR.join(filter(None, sounds + pauses))
