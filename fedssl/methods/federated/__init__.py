"""Methods that are one half of a federated rule: what their clients summarise, the strategy of the same name merges."""
