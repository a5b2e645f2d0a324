"""The report of a run: one page with results, method, costs and the commands that reproduce it."""
