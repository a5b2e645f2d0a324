"""Steering a finished policy by hand: force or forbid codes, see what each would write, regenerate from any token.
docs/steering.md.

``loading`` opens a run, ``request`` holds the requests, ``steerer`` answers; ``web`` and ``server`` put that on a
local page, ``terminal`` on a terminal.
"""
