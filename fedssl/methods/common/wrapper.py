"""A method around another one: all that it does not say itself is as the inner method says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedssl.errors import ConfigError
from fedssl.method import Augment, Batch, Examples, LossOutput, Sizes, SSLMethod, Step
from fedssl.model import Model
from fedssl.networks.norms import discard_statistics
from fedssl.parts import Coupling, Part


@dataclass(frozen=True)
class Wrapper(SSLMethod):
    """A method with another one inside.

    Attributes:
        base: the inner method.
    """

    base: SSLMethod

    @property
    def modalities(self) -> tuple[str, ...]:  # type: ignore[override]  # those of the base, which an instance knows
        """Those of the base."""
        return self.base.modalities

    @property
    def views(self) -> int:
        """Those of the base."""
        return self.base.views

    @property
    def local_views(self) -> int:
        """Those of the base."""
        return self.base.local_views

    @property
    def reads_public(self) -> bool:
        """As the base."""
        return self.base.reads_public

    @property
    def public_limit(self) -> int | None:
        """As the base."""
        return self.base.public_limit

    @property
    def public_batch(self) -> int:
        """As the base."""
        return self.base.public_batch

    @property
    def summaries(self) -> tuple[str, ...]:
        """Those of the base."""
        return self.base.summaries

    @property
    def parts(self) -> tuple[Part, ...]:
        """Those of the base."""
        return self.base.parts

    @property
    def coupling(self) -> Coupling:
        """As the base."""
        return self.base.coupling

    def init(self, encoder: nn.Module, sizes: Sizes) -> Model:
        """The model of the base."""
        return self.base.init(encoder, sizes)

    def loss(self, model: Model, batch: Batch, step: Step) -> LossOutput:
        """The loss of the base."""
        return self.base.loss(model, batch, step)

    def after_step(self, model: Model, out: LossOutput, step: Step) -> None:
        """As the base."""
        self.base.after_step(model, out, step)

    def after_merge(self, model: Model, own: Examples, public: Examples | None, augment: Augment, step: Step) -> None:
        """As the base."""
        self.base.after_merge(model, own, public, augment, step)

    def before_upload(
        self, model: Model, own: Examples, public: Examples | None, augment: Augment, generator: torch.Generator
    ) -> Mapping[str, Tensor]:
        """As the base."""
        return self.base.before_upload(model, own, public, augment, generator)


class Once(nn.Module):
    """A network that gives the same output again for an input that it has seen, so that two losses share a pass.

    Inputs are told apart by identity, not by value, and passes with a gradient from those without. Made for one batch.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self._seen: list[tuple[object, bool, Tensor]] = []

    def forward(self, x: object) -> Tensor:
        grad = torch.is_grad_enabled()
        for known, with_grad, given in self._seen:
            if known is x and with_grad == grad:
                return given
        output: Tensor = self.network(x)
        self._seen.append((x, grad, output))
        return output


def shared_passes(model: Model) -> Model:
    """The same model, whose encoder and projector see each input once."""
    once: dict[str, nn.Module] = {name: Once(model[name]) for name in ("encoder", "projector")}
    return nn.ModuleDict({**dict(model.items()), **once})


def check_projects(base: SSLMethod, mine: tuple[str, ...]) -> None:
    """Refuse a base without an encoder and a projector, or with parts of the wrapper's names.

    Raises:
        ConfigError: for the first name.
    """
    names = [part.name for part in getattr(base, "parts", ())]
    for name in ("encoder", "projector"):
        if name not in names:
            raise ConfigError(
                f"method.base={type(base).__name__} has no {name}, whose outputs are compared: use one with both, "
                "such as method@method.base=simclr"
            )
    for name in mine:
        if name in names:
            raise ConfigError(f"method.base={type(base).__name__} has a part {name!r} of its own: use another base")


@torch.no_grad()
def projected_width(model: Model, dim: int) -> int:
    """How many numbers the projector makes of features (B, dim)."""
    width = model["projector"](torch.zeros(2, dim)).shape[1]
    discard_statistics(model)
    return int(width)
