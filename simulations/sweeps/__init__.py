"""Sweeps: many runs by one command, one a cell."""
