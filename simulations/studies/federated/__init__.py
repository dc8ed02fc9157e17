"""What the studies of federations share: cells of a design, intervals over seeds, probes of clients, baselines."""
