"""What several methods share: wrappers around a method, where negatives come from, clusters."""
