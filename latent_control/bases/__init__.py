"""Base LMs and what changes them: adapters, the shipped small model, the cache of merged ones."""
