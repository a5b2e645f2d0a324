"""The report of a run: one page with what it found, how, at what cost, and how to do it again."""
