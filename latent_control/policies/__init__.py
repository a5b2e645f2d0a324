"""Latent policies: which code comes next, from the base's states."""
