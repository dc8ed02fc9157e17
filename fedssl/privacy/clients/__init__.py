"""Differential privacy whose unit is a client: clip updates, and noise their sum, each, or all rounds together."""
