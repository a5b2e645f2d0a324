"""Judges: language models behind any OpenAI endpoint that score responses by a rubric, or against a reference."""
