"""Noise in whole numbers that clients add to what they hide, and what a sum with it costs in privacy."""
