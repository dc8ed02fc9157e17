"""Feature shift: what a client's camera or sensor does to examples, and tables that are seen through it."""
