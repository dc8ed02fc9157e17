"""How the server merges: each strategy is a Flower `Strategy`, its arithmetic in pure functions."""
