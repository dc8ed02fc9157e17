"""Clients that lie, for simulations: nothing of a job, and no configuration of a client, leads here."""
