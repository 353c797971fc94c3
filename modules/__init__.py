"""Mamba-ASR: frontend, encoders, decoders, searches and the Brains that train them."""
