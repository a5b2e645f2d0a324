"""Agent programs as episodes: an OpenAI endpoint beside each rollout worker, which records what they ask for."""
