"""A job, the whole of an experiment as a message, and what servers and clients build from it."""

from fedssl.job.job import Job, parse, split

__all__ = ["Job", "parse", "split"]
