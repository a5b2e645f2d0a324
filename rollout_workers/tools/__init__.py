"""Tools: Python functions that the model may call between its responses."""
