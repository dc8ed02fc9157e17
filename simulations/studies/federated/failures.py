"""Federations that should collapse, each beside a healthy twin that differs in a word, and what may save them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from simulations.studies.federated.ablations import FreeBYOL

HEALTHY, FAILURE, REMEDY = "healthy", "failure", "remedy"


@dataclass(frozen=True)
class Case:
    """A federation, and the one that it is held against.

    Attributes:
        family: of methods; its healthy one has that name.
        kind: healthy, failure or remedy.
        options: of `fedssl pretrain`.
        twin: of a failure what does better, of a remedy what fails.
        fact: the number of the papers' fact that it belongs to.
        survives: whether a failure should, after all, not collapse.
    """

    family: str
    kind: str
    options: tuple[str, ...]
    twin: str = ""
    fact: str = ""
    survives: bool = False


IID = "partition=iid"  # where it is the method that fails; a federation fails on clients that are not alike
SIMSIAM, VICREG, SIMCLR = ((f"method={name}", IID) for name in ("simsiam", "vicreg", "simclr"))
BYOL = "method=byol"
FREE = f"method._target_={FreeBYOL.__module__}.{FreeBYOL.__name__}"
TEN = "federation.clients=10"
SKEWED = (BYOL, TEN, "partition.classes_per_client=1")  # under FedAvg, which updates both networks


def _failure(family: str, *options: str, fact: str = "", survives: bool = False) -> Case:
    return Case(family, FAILURE, options, family, fact, survives)


def _saved(*options: str) -> Case:
    return Case("BYOL, IID", REMEDY, (*SKEWED, *options), "one class a client")


CASES: Mapping[str, Case] = {
    "SimSiam": Case("SimSiam", HEALTHY, SIMSIAM),
    "no stop-gradient": _failure("SimSiam", *SIMSIAM, "method.stop_gradient=false"),
    "no predictor": _failure("SimSiam", *SIMSIAM, "method.predictor=false"),
    "no stop-gradient, FedDecorr": Case(
        "SimSiam", REMEDY, (*SIMSIAM, "method.stop_gradient=false", "local.decorrelation=0.1"), "no stop-gradient"
    ),
    "FedBYOL": Case("FedBYOL", HEALTHY, (BYOL, "strategy=fedbyol")),
    "no EMA, no stop-gradient": _failure("FedBYOL", BYOL, FREE, fact="ii"),
    "target only": _failure("FedBYOL", BYOL, "strategy=fedbyol_online_target", fact="i"),
    "target only, own predictor": _failure("FedBYOL", BYOL, "strategy=fedbyol_online_target_local", fact="i"),
    "both": _failure("FedBYOL", BYOL, "strategy=fedbyol_online_both", fact="i", survives=True),
    "both, own predictor": _failure("FedBYOL", BYOL, "strategy=fedbyol_online_both_local", fact="i"),
    "eight epochs a round": _failure("FedBYOL", BYOL, "strategy=fedbyol", "local.epochs=8", "federation.rounds=2"),
    "both, faster teacher": Case("FedBYOL", REMEDY, (BYOL, "strategy=fedbyol_online_both", "method.decay=0.8"), "both"),
    "VICReg": Case("VICReg", HEALTHY, VICREG),
    "no variance": _failure("VICReg", *VICREG, "method.variance=0"),
    "no covariance": _failure("VICReg", *VICREG, "method.covariance=0"),
    "SimCLR": Case("SimCLR", HEALTHY, SIMCLR),
    "temperature 5": _failure("SimCLR", *SIMCLR, "method.temperature=5"),
    "BYOL, IID": Case("BYOL, IID", HEALTHY, (BYOL, TEN, IID)),
    "one class a client": _failure("BYOL, IID", *SKEWED),
    "three of ten a round": Case("BYOL, IID", FAILURE, (*SKEWED, "participation.fraction=0.3"), "one class a client"),
    "teacher stays (FedBYOL)": _saved("strategy=fedbyol"),
    "blend (FedEMA)": _saved("strategy=fedema"),
    "FedDecorr": _saved("local.decorrelation=0.1"),
    "heads with group norm": _saved("method.norm=group"),
    "heads with layer norm": _saved("method.norm=layer"),
}
