"""`fedssl audit`: what an attacker gets out of a finished run."""
