"""Texts and rows as batches of tokens."""
