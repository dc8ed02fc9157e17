"""What each part of a model gives for some examples: the encoder's features, and the heads' outputs on top of them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor, nn

from fedssl.method import View
from fedssl.model import Model
from fedssl.parts import part_of

CHAIN = ("encoder", "projector", "predictor")  # each reads what the one before it gives
TEACHER = "teacher"  # has an encoder of its own

Outputs = Mapping[str, Tensor]  # part -> (N, D) float32 on the host


def readable(model: Model, keys: Iterable[str]) -> tuple[str, ...]:
    """The parts of a model that can be read where these arrays are known.

    A head is read only if what it reads is: a projector that stays on its clients leaves no predictor to measure. A
    teacher that is rebuilt in each round has no arrays between rounds, so it is not there.
    """
    known = {part_of(key) for key in keys}
    chain = []
    for part in CHAIN:
        if part not in model or part not in known:
            break
        chain.append(part)
    teacher = [TEACHER] if TEACHER in model and TEACHER in known and "encoder" in _inside(model[TEACHER]) else []
    return (*chain, *teacher)


def _inside(module: nn.Module) -> Collection[str]:
    return [name for name, _ in module.named_children()]


@torch.inference_mode()
def outputs(model: Model, views: Iterable[View], parts: Collection[str]) -> dict[str, Tensor]:
    """Pass batches of views through these parts of a model, in evaluation mode; one pass of the encoder a batch.

    Args:
        model: on the device of the views.
        views: batches.
        parts: as `readable` gives them.
    """
    model.eval()
    found: dict[str, list[Tensor]] = {part: [] for part in parts}
    for view in views:
        x = view
        for part in CHAIN:
            if part in found:
                x = model[part](x)
                found[part].append(x.float().cpu())
        if TEACHER in found:
            found[TEACHER].append(model[TEACHER].get_submodule("encoder")(view).float().cpu())
    return {part: torch.cat(pieces) for part, pieces in found.items()}
