"""Studies: what the theory claims, measured centrally and under federation; one study a file."""
