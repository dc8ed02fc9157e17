"""Projectors and predictors: small multi-layer perceptrons on top of an encoder, and the pass through both."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fedssl.errors import ConfigError
from fedssl.method import View
from fedssl.model import Model
from fedssl.networks.norms import norm1d


def mlp(
    inputs: int, hidden: int, outputs: int, *, norm: str, layers: int = 2, norm_last: bool = False
) -> nn.Sequential:
    """`layers` linear maps (B, inputs) -> (B, outputs), each but the last followed by a normalisation and a ReLU.

    Args:
        inputs, hidden, outputs: widths.
        norm: batch, group, layer or none.
        layers: number of linear maps, at least 1.
        norm_last: whether a normalisation follows the last map too (SimSiam's projector), then without bias in it.
    """
    if min(inputs, hidden, outputs, layers) < 1:
        raise ConfigError(
            f"a head of widths {inputs}, {hidden}, {outputs} with {layers} layers cannot be built: all must be positive"
        )
    modules: list[nn.Module] = []
    width = inputs
    for _ in range(layers - 1):
        modules += [nn.Linear(width, hidden, bias=norm == "none"), norm1d(norm, hidden), nn.ReLU(inplace=True)]
        width = hidden
    modules.append(nn.Linear(width, outputs, bias=not (norm_last and norm != "none")))
    if norm_last:
        modules.append(norm1d(norm, outputs))
    return nn.Sequential(*modules)


def embed(model: Model, views: Sequence[View]) -> tuple[list[Tensor], list[Tensor]]:
    """Features (B, dim) and projections (B, out) of each view, by the model's encoder and projector."""
    features = [model["encoder"](view) for view in views]
    return features, [model["projector"](x) for x in features]
