"""Kinds of data: their views and their encoders."""
