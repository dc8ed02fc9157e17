"""Strategies by which clients exchange more than weights: projections of examples, their own or public ones."""
