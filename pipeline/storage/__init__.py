"""Durable files: atomic writes, checksummed lines, checkpoints."""
