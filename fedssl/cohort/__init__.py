"""Several clients of one process trained at once, as one batch of models."""
