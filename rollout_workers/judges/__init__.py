"""Models that judge responses: language models behind any OpenAI endpoint, by a rubric or against a reference, and
preference reward models."""
