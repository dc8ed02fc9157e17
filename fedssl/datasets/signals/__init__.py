"""Data sources of time series."""
