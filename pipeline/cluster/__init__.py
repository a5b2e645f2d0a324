"""Ray clusters: connecting, shared storage, submitting jobs."""
