"""Drivers: the command line, and the studies."""
