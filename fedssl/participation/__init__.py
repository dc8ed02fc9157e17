"""Who takes part when: pure functions of (clients, round, seed) that know nothing of training."""
