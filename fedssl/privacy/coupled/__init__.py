"""Record-level mechanisms for losses in which the records of a batch meet: in groups, and pair by pair."""
