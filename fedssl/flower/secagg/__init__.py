"""Secure aggregation over Flower messages: what travels, a client's answers, the server's questions."""
