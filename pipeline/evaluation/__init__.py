"""Pure numbers of an evaluation: statistics, outcomes, gates, slices, diversity, cost."""
