"""Self-supervised methods, one a file."""
