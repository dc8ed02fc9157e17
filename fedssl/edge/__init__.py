"""What the owner of a device sets for it: time for a round, bounds of battery and heat, a key for what is stored."""
