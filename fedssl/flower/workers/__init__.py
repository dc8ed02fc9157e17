"""What runs the turns of clients on this machine: threads of the run's own process, or processes of their own."""
