"""What networks are made of and what is done to them: norms, heads, teachers, keys, weights from elsewhere."""
