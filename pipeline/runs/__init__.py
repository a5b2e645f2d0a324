"""The run folder: layout, manifests, events, metrics, status."""
