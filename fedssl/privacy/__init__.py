"""What may be claimed of what leaves a client, and how much of it has been spent."""
