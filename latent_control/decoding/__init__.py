"""Decoding: continuous batching, its key-value memory, and how actions become tokens."""
