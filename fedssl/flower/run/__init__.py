"""A run on the server: what its rounds share, whom each asks, what comes back, what it costs, how the run ends."""
