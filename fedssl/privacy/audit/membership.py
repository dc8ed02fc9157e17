"""Membership inference on a trained model: features of examples in which members may differ from others.

Every function reads a model in evaluation mode and gives numbers for each example; none reads a label.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedssl import seeds
from fedssl.client import beside, public_rows
from fedssl.errors import ConfigError
from fedssl.losses.similarity import unit
from fedssl.method import Augment, Batch, Examples, SSLMethod, Step, views_of
from fedssl.model import Model
from fedssl.networks.teacher import Target
from fedssl.parts import Coupling

Floats = NDArray[np.float64]
_BATCH = 128  # examples, of which all views are encoded at once


@dataclass(frozen=True, eq=False)
class Attacked:
    """What the attacker holds: the released model, and how views are drawn.

    Attributes:
        method, model: the model is filled with the released arrays; what stays on clients is as initialised.
        augment: draws the views.
        known: the parts of the model that were released, or follow from those.
        public: the public examples that the method reads, if any.
        count: augmentations of each example, N.
        seed: of the augmentations.
    """

    method: SSLMethod
    model: Model
    augment: Augment
    known: frozenset[str]
    public: Examples | None = None
    count: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if self.count < 2:
            raise ConfigError(f"{self.count} augmentations of an example have no similarity: give at least 2")


def statistics(attacked: Attacked, examples: Examples, group: str) -> Mapping[str, Floats]:
    """All that there is to say of some examples: name -> (n, F), larger meaning "member" where F is 1 but for the norm.

    - `encoder views`: the N (N - 1) / 2 cosines between features of augmentations, each row sorted.
    - `projector views`: the same of the projector's outputs, where it is known.
    - `norm`: (n, 1) length of the features of the example itself.
    - `agreement`: (n, 1) mean cosine of the student's output for one view with the teacher's (without one, with the
      projector's) for another, where there is a predictor or a teacher.
    - `loss`: (n, 1) minus the training objective, where one example's loss reads no other (coupling none).

    Args:
        attacked: the model.
        examples: members, or others.
        group: names the stream of the augmentations.

    References:
        Liu et al. 2021 (EncoderMI), https://arxiv.org/abs/2108.11023
    """
    attacked.model.eval()
    found: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        for index, views in _views(attacked, examples, group):
            for name, values in _of_batch(attacked, views).items():
                found.setdefault(name, []).append(values)
            plain = attacked.model["encoder"](attacked.augment.plain(examples.batch(index)))
            found.setdefault("norm", []).append(plain.float().norm(dim=1, keepdim=True).cpu())
        loss = _losses(attacked, examples, group) if _has_loss(attacked) else None
    table = {name: torch.cat(pieces).double().numpy() for name, pieces in found.items()}
    return table | ({} if loss is None else {"loss": -loss})


def cosines(embeddings: Tensor) -> Tensor:
    """(n, V (V - 1) / 2) cosines between the V embeddings of each example (n, V, D), each row ascending."""
    directions = unit(embeddings)
    upper = torch.triu_indices(embeddings.shape[1], embeddings.shape[1], 1)
    return (directions @ directions.transpose(1, 2))[:, upper[0], upper[1]].sort(dim=1).values


def trained(
    members: Floats, others: Floats, *, seed: int
) -> tuple[Floats, Floats, tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """The scores of an attacker who knows half of each group: a logistic regression fitted to it, read on the rest.

    Args:
        members, others: (n, F) and (m, F), at least 4 rows each.
        seed: draws the halves.

    Returns:
        Log-odds of the other halves' rows of both groups, and which rows these are.

    Raises:
        ConfigError: fewer rows.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if min(len(members), len(others)) < 4:
        raise ConfigError(
            f"{len(members)} members and {len(others)} others cannot train an attack and test it: give 4 of each"
        )
    rng = seeds.stream(seed, "audit", "halves")
    (known, rest), (known_others, rest_others) = (
        np.array_split(rng.permutation(len(group)), 2) for group in (members, others)
    )
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
    labels = np.repeat((1, 0), (len(known), len(known_others)))
    classifier.fit(np.concatenate((members[known], others[known_others])), labels)
    scores = [np.asarray(classifier.decision_function(x)) for x in (members[rest], others[rest_others])]
    return scores[0], scores[1], (rest, rest_others)


def _views(attacked: Attacked, examples: Examples, group: str) -> Iterator[tuple[Tensor, list[Tensor]]]:
    device = next(attacked.model.parameters()).device
    generator = seeds.torch_stream(attacked.seed, "audit", "views", group, device=device)
    for index in torch.split(torch.arange(len(examples), device=device), _BATCH):
        yield index, list(attacked.augment.views(examples.batch(index), generator, attacked.count))


def _of_batch(attacked: Attacked, views: list[Tensor]) -> dict[str, Tensor]:
    model = attacked.model
    features = [model["encoder"](view) for view in views]
    out = {"encoder views": cosines(torch.stack(features, 1).float())}
    if "projector" not in attacked.known:
        return {name: value.cpu() for name, value in out.items()}
    projections = [model["projector"](each) for each in features]
    out["projector views"] = cosines(torch.stack(projections, 1).float())
    teacher: nn.Module | None = Target(model) if "teacher" in attacked.known else None
    predictor: nn.Module | None = model["predictor"] if "predictor" in attacked.known else None
    if teacher is not None or predictor is not None:
        student = [unit(each if predictor is None else predictor(each)) for each in projections]
        target = [unit(each) for each in (projections if teacher is None else [teacher(view) for view in views])]
        # Each view with the next: N pairs of different views, both kinds where views are of two modalities in turn.
        each = [(student[i] * target[i - 1]).sum(1) for i in range(len(views))]
        out["agreement"] = torch.stack(each, 1).mean(1, keepdim=True)
    return {name: value.cpu() for name, value in out.items()}


def _has_loss(attacked: Attacked) -> bool:
    needed = {part.name for part in attacked.method.parts}
    return attacked.method.coupling is Coupling.none and needed <= attacked.known


def _losses(attacked: Attacked, examples: Examples, group: str) -> Floats:
    """(n, 1) the mean objective of each example over so many draws of its views."""
    method, model, augment = attacked.method, attacked.model, attacked.augment
    device = next(model.parameters()).device
    draws = max(1, attacked.count // max(1, method.views))
    generator = seeds.torch_stream(attacked.seed, "audit", "loss", group, device=device)
    readings = seeds.stream(attacked.seed, "audit", "public")
    losses = []
    for index in torch.split(torch.arange(len(examples), device=device), _BATCH):
        x, total = examples.batch(index), torch.zeros(len(index), device=device)
        for _ in range(draws):
            views = views_of(method, augment, x, generator)
            rows = public_rows(method, attacked.public, readings, device)
            batch = beside(Batch(views, index), attacked.public, augment, rows)
            out = method.loss(model, batch, Step(1, 1, 0, 1))
            if out.per_example is None:
                raise ConfigError("the method couples nothing and yet gives no loss per example: correct its loss")
            total += out.per_example.float()
        losses.append((total / draws).cpu())
    return torch.cat(losses).double().numpy()[:, None]
