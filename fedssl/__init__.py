"""Federated, privacy-preserving self-supervised learning.

Nothing is imported here: Flower's command line imports this package, and `fedssl --help` should be quick.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedssl.export import load_encoder
    from fedssl.simulation import simulate

__all__ = ["load_encoder", "simulate"]


def __getattr__(name: str) -> Any:
    if name == "load_encoder":
        from fedssl.export import load_encoder

        return load_encoder
    if name == "simulate":
        from fedssl.simulation import simulate

        return simulate
    raise AttributeError(f"module 'fedssl' has no attribute {name!r}")
