"""Training of many policies at once on one bank."""
