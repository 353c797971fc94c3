"""A small corpus of synthesised speech, for trying the recipes without any download."""
