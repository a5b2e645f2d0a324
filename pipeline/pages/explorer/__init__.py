"""The explorer of a run: what its codes do, why an output came about, and which codes carry the gain of reinforcement
learning.

``build`` makes the dataset out of a run folder, ``page`` puts it into one HTML file with the assets. docs/explorer.md
has the formulas.
"""
