"""What of an update goes over the wire, and how numbers become few bytes."""

from fedssl.compression.update import Compression

__all__ = ["Compression"]
