"""Federations that should collapse, each beside a healthy twin that differs in a word, and what may save them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from simulations.studies.federated.ablations import FreeBYOL

FREE = f"method._target_={FreeBYOL.__module__}.{FreeBYOL.__name__}"
ONE = ("partition.classes_per_client=1", "federation.clients=10")
HEALTHY, FAILURE, REMEDY = "healthy", "failure", "remedy"


@dataclass(frozen=True)
class Case:
    """A federation, and the one that it is held against.

    Attributes:
        family: of methods; its healthy one has that name.
        kind: healthy, failure or remedy.
        options: of `fedssl pretrain`.
        twin: of a failure what is healthy, of a remedy what fails.
        fact: the number of the papers' fact that it belongs to.
        survives: whether a failure should, after all, not collapse.
    """

    family: str
    kind: str
    options: tuple[str, ...]
    twin: str = ""
    fact: str = ""
    survives: bool = False


def _healthy(family: str, *options: str) -> Case:
    return Case(family, HEALTHY, options)


def _failure(family: str, *options: str, fact: str = "", survives: bool = False) -> Case:
    return Case(family, FAILURE, options, family, fact, survives)


def _remedy(family: str, twin: str, *options: str) -> Case:
    return Case(family, REMEDY, options, twin)


SIMSIAM, BYOL, VICREG, SIMCLR = (f"method={name}" for name in ("simsiam", "byol", "vicreg", "simclr"))
CASES: Mapping[str, Case] = {
    "SimSiam": _healthy("SimSiam", SIMSIAM),
    "no stop-gradient": _failure("SimSiam", SIMSIAM, "method.stop_gradient=false"),
    "no predictor": _failure("SimSiam", SIMSIAM, "method.predictor=false"),
    "no stop-gradient, FedDecorr": _remedy(
        "SimSiam", "no stop-gradient", SIMSIAM, "method.stop_gradient=false", "local.decorrelation=0.1"
    ),
    "FedBYOL": _healthy("FedBYOL", BYOL, "strategy=fedbyol"),
    "no EMA, no stop-gradient": _failure("FedBYOL", BYOL, FREE, fact="ii"),
    "target only": _failure("FedBYOL", BYOL, "strategy=fedbyol_online_target", fact="i"),
    "target only, own predictor": _failure("FedBYOL", BYOL, "strategy=fedbyol_online_target_local", fact="i"),
    "both": _failure("FedBYOL", BYOL, "strategy=fedbyol_online_both", fact="i", survives=True),
    "both, own predictor": _failure("FedBYOL", BYOL, "strategy=fedbyol_online_both_local", fact="i"),
    "both, FedEMA's blend": _remedy("FedBYOL", "both", BYOL, "strategy=fedema"),
    "both, FedDecorr": _remedy("FedBYOL", "both", BYOL, "strategy=fedbyol_online_both", "local.decorrelation=0.1"),
    "VICReg": _healthy("VICReg", VICREG),
    "no variance": _failure("VICReg", VICREG, "method.variance=0"),
    "no covariance": _failure("VICReg", VICREG, "method.covariance=0"),
    "SimCLR": _healthy("SimCLR", SIMCLR),
    "temperature 5": _failure("SimCLR", SIMCLR, "method.temperature=5"),
}
