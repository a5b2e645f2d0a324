"""Export, registration and serving."""
