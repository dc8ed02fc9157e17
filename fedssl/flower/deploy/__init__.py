"""Federations of real machines: keys, a node's own data, and runs that are handed to a SuperLink."""
