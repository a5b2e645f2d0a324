"""Experiments on finished runs: comparisons, pilots, sweeps, searches."""
