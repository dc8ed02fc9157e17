"""A SuperLink in miniature, for faults that need no processes."""
