"""Data sources, one a file: each a frozen dataclass with `augment` and `load() -> Data`."""
