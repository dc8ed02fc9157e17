"""Measurements of speed and memory: `python -m benchmarks.NAME`. Tests check that they work, never times."""
