"""What stands on finished runs: comparisons, pilots, sweeps, searches."""
