"""Language models: text, n-grams, networks over subword units."""
