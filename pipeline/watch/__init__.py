"""Watching a run while it works, or afterwards: curves, rollouts, time, on a local page. docs/watch.md.

``followed_run`` reads a run folder as it grows, ``time_spent`` says where its time went, ``web`` and ``page`` put that
on a page.
"""
