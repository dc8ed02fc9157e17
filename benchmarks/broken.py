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
HOME = ("strategy.share.predictor=local", "strategy.share.teacher=local")
COLLAPSE = ("complete collapse", "dimensional collapse")
SAME, FAST, IDLE, WEIGHTS = (
    *("teacher is the student", "teacher moves too fast"),
    *("predictor idle", "weights do not add up to 1"),
)


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


class PassOn(nn.Module):
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
    """Every failure that the alarms name, and some that are too mild for them."""
    collapses = {
        "SimSiam without stop-gradient": ("method=simsiam", "method.stop_gradient=false"),
        "SimSiam without stop-gradient or batch norm": (
            "method=simsiam",
            "method.stop_gradient=false",
            "method.norm=none",
        ),
        "SimSiam without predictor": ("method=simsiam", "method.predictor=false"),
        "BYOL without predictor": ("method=byol", "method.predictor=false"),
        "VICReg without variance": ("method=vicreg", "method.variance=0.0"),
        "DINO without centre or sharpening": ("method=dino", "method.center=none", *SOFT),
    }
    teachers = {
        "BYOL, decay 0": (SAME, "method=byol", "method.decay=0.0", "method.decay_schedule=constant"),
        "BYOL, decay 0.004 for 0.996": (FAST, "method=byol", "method.decay=0.004"),
        "MoCo, decay 0.01 for 0.99": (FAST, "method=moco", "method.decay=0.01"),
        "BYOL, decay 0.6": (FAST, "method=byol", "method.decay=0.6"),
    }
    skewed = {"SimCLR": "method=simclr", "BYOL": "method=byol", "SimSiam": "method=simsiam"}
    hasty = {"IID": IID, "one class a client": ONE_CLASS}
    return [
        *(Case(name, COLLAPSE, (*options, *SKEWED, *LONG)) for name, options in collapses.items()),
        *(Case(name, (alarm,), (*options, *SHORT)) for name, (alarm, *options) in teachers.items()),
        Case("BYOL, teacher and student one object", (SAME,), ("method=byol", *SHORT), same_object()),
        Case("BYOL, predictor frozen", (IDLE,), ("method=byol", *SHORT), predictor(BYOL, frozen)),
        Case("SimSiam, predictor frozen", (IDLE,), ("method=simsiam", *SHORT), predictor(SimSiam, frozen)),
        Case("BYOL, predictor passes on its input", (IDLE,), ("method=byol", *SHORT), predictor(BYOL, PassOn)),
        *(
            Case(f"weights that add up to {factor}", (WEIGHTS,), ("method=simclr", *SKEWED, *SHORT), scaled(factor))
            for factor in (0.34, 0.9, 0.98, 0.995)
        ),
        *(
            Case(f"{name}, one class a client, 10 local epochs", ("skew hurts",), (method, *ONE_CLASS, *FAR))
            for name, method in skewed.items()
        ),
        *(
            Case(f"SimCLR, {name}, 10 local epochs, local.lr=0.02", ("merge hurts",), (*where, *FAR, "local.lr=0.02"))
            for name, where in hasty.items()
        ),
    ]


def methods() -> list[str]:
    """Those that make sense on the digits: FLESD learns on public examples, and there are none beside the clients'."""
    names = [name for name in config.options_of("method") if name != "flesd"]
    return [name for name in names if "images" in config.compose(own(name)).job.method.modalities]


def own(method: str) -> list[str]:
    """A method as it comes, with the strategy of its name where there is one; FedCA's clients agree to its upload."""
    strategy = [f"strategy={method}"] if method in config.options_of("strategy") else []
    return [f"method={method}", *strategy, *(["payload.allow=[projections]"] if method == "fedca" else [])]


def healthy() -> list[Case]:
    """Every method on images as it comes, IID and skewed, more local epochs, other strategies and norms."""
    splits = {"IID": IID, "Dir(0.1)": SKEWED}
    others = {
        "SimCLR, FedAdam": ("strategy=fedadam", *SKEWED, "participation.fraction=0.5"),
        "SimCLR, FedMedian": ("strategy=fedmedian", *SKEWED),
        "SimCLR, FedBN": ("strategy=fedbn", *SKEWED),
        "SimCLR, uniform weights, quantity skew": (
            "strategy.weighting=uniform",
            "partition=quantity_skew",
            "partition.alpha=0.2",
        ),
        "SimCLR, batch norm in the encoder": ("method=simclr", "encoder.norm=batch", *SKEWED),
        "BYOL, batch norm in the encoder": ("method=byol", "encoder.norm=batch", *SKEWED),
        "BYOL, teacher and predictor at home": ("method=byol", *HOME, *SKEWED),
    }
    return [
        *(Case(f"{n}, {s}", (), (*own(n), *where, *TEN)) for n in methods() for s, where in splits.items()),
        *(Case(f"{n}, IID, 5 local epochs", (), (f"method={n}", *IID, *LONG)) for n in ("byol", "mae", "vicreg")),
        *(Case(name, (), (*options, *TEN)) for name, options in others.items()),
    ]
