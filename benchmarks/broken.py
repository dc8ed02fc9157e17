"""Federations broken on purpose, each in one way, to see whether the monitor says which; and healthy ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

from torch import Tensor, nn

from fedssl import config
from fedssl.method import Sizes
from fedssl.methods import byol
from fedssl.methods.byol import BYOL
from fedssl.methods.simsiam import SimSiam
from fedssl.model import Model
from strategies.fedavg import FedAvg

Break = Callable[[], AbstractContextManager[object]]
IID: tuple[str, ...] = ("partition=iid",)
SKEWED = ("partition=dirichlet", "partition.alpha=0.1")
ONE_CLASS = ("partition=pathological", "partition.classes_per_client=1")
LONG = ("local.epochs=5", "federation.rounds=8")
FAR = ("local.epochs=10", "federation.rounds=3", "local.schedule=constant", "local.warmup=0.0")
SHORT = ("federation.rounds=3",)
TEN = ("federation.rounds=10",)
SOFT = ("method.teacher_temperature=0.1", "method.teacher_temperature_start=0.1")
COLLAPSIBLE = ("byol", "dino", "mae", "simsiam", "vicreg")
COLLAPSE = ("complete collapse", "dimensional collapse")


@dataclass(frozen=True)
class Case:
    """A federation, and the alarms of which one should be raised: none for a healthy one."""

    name: str
    expects: tuple[str, ...]
    options: tuple[str, ...]
    broken: Break = nullcontext


def scaled(factor: float) -> Break:
    """A strategy whose weights add up to `factor`."""

    def merge(self: FedAvg, now: Any, updates: Sequence[Any]) -> Any:
        arrays = updates[0].arrays
        return {key: (value * factor).astype(value.dtype) for key, value in arrays.items()}

    return lambda: mock.patch.object(FedAvg, "merge", merge)


class _PassOn(nn.Module):
    """A head that adds next to nothing to its input."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.01 * self.head(x)


def predictor(method: type[Any], change: Callable[[nn.Module], nn.Module]) -> Break:
    """A method whose predictor is another."""
    genuine = method.init

    def init(self: Any, encoder: nn.Module, sizes: Sizes) -> Model:
        model: Model = genuine(self, encoder, sizes)
        model["predictor"] = change(model["predictor"])
        return model

    return lambda: mock.patch.object(method, "init", init)


def frozen(head: nn.Module) -> nn.Module:
    """A head that is not trained."""
    return head.requires_grad_(False)


def same_object() -> Break:
    """A teacher that is its student: one object under two names."""

    def modules(student: dict[str, nn.Module], schedule: str) -> dict[str, nn.Module]:
        return {"teacher": nn.ModuleDict({name: student[name] for name in ("encoder", "projector")})}

    return lambda: mock.patch.object(byol, "teacher_modules", modules)


def provoked() -> list[Case]:
    """Every failure that the alarms name, and three that are too mild for them."""
    student, fast, idle, weights = (
        "teacher is the student",
        "teacher moves too fast",
        "predictor idle",
        "weights do not add up to 1",
    )
    collapses = [
        ("SimSiam without stop-gradient", ("method=simsiam", "method.stop_gradient=false")),
        ("the same without batch norm", ("method=simsiam", "method.stop_gradient=false", "method.norm=none")),
        ("SimSiam without predictor", ("method=simsiam", "method.predictor=false")),
        ("BYOL without predictor", ("method=byol", "method.predictor=false")),
        ("VICReg without variance", ("method=vicreg", "method.variance=0.0")),
        ("DINO without centre or sharpening", ("method=dino", "method.center=none", *SOFT)),
    ]
    skewed = [
        Case(f"{name}, {split}", COLLAPSE, (*options, *LONG, *where))
        for name, options in collapses
        for split, where in (("IID", IID), ("Dir(0.1)", SKEWED))
    ]
    return [
        *skewed,
        Case(
            "BYOL, decay 0", (student,), ("method=byol", "method.decay=0.0", "method.decay_schedule=constant", *SHORT)
        ),
        Case("BYOL, teacher and student one object", (student,), ("method=byol", *SHORT), same_object()),
        Case("BYOL, decay 0.004 for 0.996", (fast,), ("method=byol", "method.decay=0.004", *SHORT)),
        Case("MoCo, decay 0.01 for 0.99", (fast,), ("method=moco", "method.decay=0.01", *SHORT)),
        Case("BYOL, decay 0.6", (fast,), ("method=byol", "method.decay=0.6", *SHORT)),
        Case("BYOL, predictor frozen", (idle,), ("method=byol", *SHORT), predictor(BYOL, frozen)),
        Case("SimSiam, predictor frozen", (idle,), ("method=simsiam", *SHORT), predictor(SimSiam, frozen)),
        Case("BYOL, predictor passes on its input", (idle,), ("method=byol", *SHORT), predictor(BYOL, _PassOn)),
        *(
            Case(f"weights that add up to {factor}", (weights,), ("method=simclr", *SKEWED, *SHORT), scaled(factor))
            for factor in (0.34, 0.9, 0.98, 0.995)
        ),
        *(
            Case(f"{name}, one class a client, 10 local epochs", ("skew hurts",), (f"method={key}", *ONE_CLASS, *FAR))
            for name, key in (("SimCLR", "simclr"), ("BYOL", "byol"), ("SimSiam", "simsiam"))
        ),
        *(
            Case(
                f"SimCLR, {split}, 10 local epochs at ten times the rate",
                ("merge hurts",),
                ("method=simclr", *where, *FAR, "local.lr=0.02"),
            )
            for split, where in (("IID", IID), ("one class a client", ONE_CLASS))
        ),
    ]


def healthy() -> list[Case]:
    """Every method on images as it comes, IID and skewed, and longer local training of those that can collapse."""
    names = [
        n for n in config.options_of("method") if "images" in config.compose([f"method={n}"]).job.method.modalities
    ]
    splits = (("IID", IID), ("Dir(0.1)", SKEWED))
    plain = [Case(f"{n}, {split}", (), (f"method={n}", *where, *TEN)) for n in names for split, where in splits]
    longer = [Case(f"{n}, IID, 5 local epochs", (), (f"method={n}", *IID, *LONG)) for n in names if n in COLLAPSIBLE]
    others = [
        Case("simclr, FedAdam", (), ("method=simclr", "strategy=fedadam", *SKEWED, "participation.fraction=0.5", *TEN)),
        Case("simclr, FedMedian", (), ("method=simclr", "strategy=fedmedian", *SKEWED, *TEN)),
        Case("simclr, FedBN", (), ("method=simclr", "strategy=fedbn", *SKEWED, *TEN)),
        Case(
            "simclr, uniform weights, quantity skew",
            (),
            ("method=simclr", "strategy.weighting=uniform", "partition=quantity_skew", "partition.alpha=0.2", *TEN),
        ),
        Case(
            "byol, predictor and teacher at home",
            (),
            ("method=byol", "strategy.share.predictor=local", "strategy.share.teacher=local", *SKEWED, *TEN),
        ),
    ]
    return [*plain, *longer, *others]
