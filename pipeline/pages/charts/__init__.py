"""Pictures of numbers with their intervals, as SVG, each with the same in words and as a table."""
