"""What a run has besides its rounds: what they share, what it claims, how it ends."""
