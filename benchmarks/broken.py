"""Federations broken on purpose, each in one way, to see whether the monitor says which; and healthy ones beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import nn

from fedssl import heads
from fedssl.methods import byol, simsiam
from fedssl.method import Sizes
from fedssl.model import Model
from strategies.fedavg import FedAvg

Break = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True)
class Case:
    """A federation, and the alarms of which at least one should be raised; none for a healthy one."""

    name: str
    expects: tuple[str, ...]
    options: tuple[str, ...]
    broken: Break = nullcontext


def scaled(factor: float) -> Break:
    """A strategy whose weights add up to `factor`."""

    def merge(self: FedAvg, now: Any, updates: Sequence[Any]) -> Any:
        return {key: value * factor if value.dtype.kind == "f" else value for key, value in updates[0].arrays.items()}

    return lambda: mock.patch.object(FedAvg, "merge", merge)


def lists_joined(keep: float = 0.9) -> Break:
    """The weights of a momentum rule joined as lists instead of added: `keep` times the mean is all that is left."""
    return scaled(keep)


def idle(method: type[Any], identity: bool) -> Break:
    """A predictor that is not trained: as it was drawn, or the identity."""
    genuine = method.init

    def init(self: Any, encoder: nn.Module, sizes: Sizes) -> Model:
        model: Model = genuine(self, encoder, sizes)
        if identity:
            model["predictor"] = nn.Identity()
        model["predictor"].requires_grad_(False)
        return model

    return lambda: mock.patch.object(method, "init", init)


def same_object() -> Break:
    """A teacher that is its student, as one object."""

    def modules(student: dict[str, nn.Module], schedule: str) -> dict[str, nn.Module]:
        return {"teacher": nn.ModuleDict({name: student[name] for name in ("encoder", "projector")})}

    return lambda: mock.patch.object(byol, "teacher_modules", modules)
