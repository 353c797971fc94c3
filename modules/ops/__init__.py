"""Operators with several backends; each folder holds one operator and picks its backend."""
