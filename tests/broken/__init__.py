"""Mechanisms that claim more privacy than they give, kept so that the audits have something to find. For tests only."""
