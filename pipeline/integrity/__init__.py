"""Audit, reproduction and diagnosis of runs."""
