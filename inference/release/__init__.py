"""Packages as files to attach to a release: small, checked, with a card that says their limits."""
