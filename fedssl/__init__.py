"""Federated, privacy-preserving self-supervised learning.

Nothing is imported here: Flower's command line imports this package, and `fedssl --help` should be quick.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedssl.export import load_encoder

__all__ = ["load_encoder"]


def __getattr__(name: str) -> Any:
    if name == "load_encoder":
        from fedssl.export import load_encoder

        return load_encoder
    raise AttributeError(f"module 'fedssl' has no attribute {name!r}")
