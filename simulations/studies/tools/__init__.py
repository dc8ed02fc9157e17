"""What studies share: finished runs as models, critics on small worlds, data of two factors."""
