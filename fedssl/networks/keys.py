"""Keys of earlier batches as negatives: a first-in-first-out queue, and a bank with one key an example."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedssl.errors import ConfigError
from fedssl.method import Augment, Examples
from fedssl.networks.norms import discard_statistics

ON_MERGE = ("keep", "clear", "reencode")
_PIECE = 512  # examples encoded at a time


class KeyQueue(nn.Module):
    """The last `size` keys of a client, on the unit sphere, oldest overwritten first.

    All of it is state: the keys, whose they are, and how many have ever been pushed. Places that were never filled hold
    zero vectors, whose cosine with everything is 0, as that of random keys is on average. A batch that straddles the
    end wraps around, nothing is dropped; one larger than the queue leaves its last `size` keys.

    Attributes:
        keys: (size, D) float32.
        index: (size,) int64, the example of each key; -1 in places that were never filled.
        pushed: () int64.
    """

    keys: Tensor
    index: Tensor
    pushed: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        if size < 1:
            raise ConfigError(f"a queue of {size} keys holds nothing: give at least 1")
        self.register_buffer("keys", torch.zeros(size, dim))
        self.register_buffer("index", torch.full((size,), -1, dtype=torch.int64))
        self.register_buffer("pushed", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def push(self, keys: Tensor, index: Tensor) -> None:
        """Add the keys (B, D) of the examples `index` (B,), normalised here. Does not wait for the device."""
        new = F.normalize(keys.detach().to(self.keys), dim=1)[-len(self.keys) :]
        skipped = len(keys) - len(new)
        places = (self.pushed + skipped + torch.arange(len(new), device=new.device)) % len(self.keys)
        self.keys.index_copy_(0, places, new)
        self.index.index_copy_(0, places, index[skipped:])
        self.pushed.add_(len(keys))

    @torch.no_grad()
    def refresh(self, on_merge: str, encoder: nn.Module, own: Examples, augment: Augment) -> None:
        """Do with keys of older weights what `on_merge` says: keep, clear, or reencode their examples."""
        if on_merge == "clear":
            self.keys.zero_()
            self.index.fill_(-1)
            self.pushed.zero_()
        elif on_merge == "reencode":
            places = (self.index >= 0).nonzero()[:, 0]
            if len(places):
                self.keys[places] = keys_of(encoder, own, self.index[places], augment).to(self.keys)


class KeyBank(nn.Module):
    """One key for each of a client's examples, on the unit sphere.

    Attributes:
        keys: (n, D) float32; zero vectors for examples that have not been seen.
    """

    keys: Tensor

    def __init__(self, examples: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("keys", torch.zeros(examples, dim))

    @torch.no_grad()
    def update(self, keys: Tensor, index: Tensor, momentum: float) -> None:
        """Move the keys of the examples `index` (B,) towards `keys` (B, D): momentum * old + (1 - momentum) * new."""
        new = F.normalize(keys.detach().to(self.keys), dim=1)
        mixed = torch.lerp(new, self.keys.index_select(0, index), momentum)
        self.keys.index_copy_(0, index, F.normalize(mixed, dim=1))

    @torch.no_grad()
    def refresh(self, on_merge: str, encoder: nn.Module, own: Examples, augment: Augment) -> None:
        """As `KeyQueue.refresh`; keys that are not there yet are made, so that no example lacks its class."""
        lacking = ~self.keys.any(1)
        if on_merge == "clear":
            self.keys.zero_()
        elif on_merge == "reencode" or bool(lacking.any()):
            every = torch.arange(len(own), device=self.keys.device)
            keys = keys_of(encoder, own, every, augment)
            self.keys.copy_(keys if on_merge == "reencode" else torch.where(lacking[:, None], keys, self.keys))


@torch.no_grad()
def outputs_of(encoder: nn.Module, examples: Examples, index: Tensor, augment: Augment) -> Tensor:
    """(N, D) an encoder's outputs for these examples, from views without augmentation, in its present mode.

    Pieces are of nearly equal size, so that batch normalisation never meets a single example at the end.
    """
    pieces = torch.tensor_split(index, max(1, -(-len(index) // _PIECE)))
    outputs = [encoder(augment.plain(examples.batch(piece))).float() for piece in pieces]
    discard_statistics(encoder)
    return torch.cat(outputs)


def keys_of(encoder: nn.Module, examples: Examples, index: Tensor, augment: Augment) -> Tensor:
    """(N, D) keys: `outputs_of` at length 1."""
    return F.normalize(outputs_of(encoder, examples, index, augment), dim=1)


def spread(total: int, limit: int | None) -> Tensor:
    """(min(total, limit),) int64, positions in [0, total) at even distances; all of them without a limit."""
    count = total if limit is None else min(total, limit)
    return torch.arange(count) * total // max(1, count)


def check_on_merge(value: str) -> None:
    """Refuse a word that is not known.

    Raises:
        ConfigError: not keep, clear or reencode.
    """
    if value not in ON_MERGE:
        raise ConfigError(f"method.on_merge={value!r} is unknown: use {', '.join(ON_MERGE)}")
