"""How the updates of a round become what a strategy merges: each as it is, or one mean that hides the single ones."""
