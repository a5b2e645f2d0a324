"""Files that are whole or not there: atomic writes, checksummed lines, checkpoints."""
