"""The displays of a run: live view, plain lines, JSON lines."""
