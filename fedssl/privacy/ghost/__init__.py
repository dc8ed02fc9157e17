"""Gradients of records without a backward pass for each: ghost norms and sums, layer by layer."""
