"""A first-in-first-out queue of keys: negatives from earlier batches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedssl.errors import ConfigError


class KeyQueue(nn.Module):
    """The last `size` keys of a client, on the unit sphere, oldest overwritten first.

    All of it is state: the keys, and how many have ever been pushed. Places that were never filled hold zero vectors,
    whose cosine with everything is 0, as that of random keys is on average. A batch that straddles the end wraps
    around, nothing is dropped; one larger than the queue leaves its last `size` keys.

    Attributes:
        keys: (size, D) float32.
        pushed: () int64.
    """

    keys: Tensor
    pushed: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        if size < 1:
            raise ConfigError(f"a queue of {size} keys holds nothing: give at least 1")
        self.register_buffer("keys", torch.zeros(size, dim))
        self.register_buffer("pushed", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def push(self, keys: Tensor) -> None:
        """Add keys (B, D), normalised here. Does not wait for the device."""
        new = F.normalize(keys.detach().to(self.keys), dim=1)[-len(self.keys) :]
        skipped = len(keys) - len(new)
        places = (self.pushed + skipped + torch.arange(len(new), device=new.device)) % len(self.keys)
        self.keys.index_copy_(0, places, new)
        self.pushed.add_(len(keys))
