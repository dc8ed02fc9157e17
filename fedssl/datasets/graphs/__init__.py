"""Data sources of graphs."""
