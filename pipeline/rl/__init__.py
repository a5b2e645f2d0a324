"""Reinforcement learning: RLlib's Algorithm, rollout pool, ledger, staleness."""
