"""How far a round of local training moves a model's parts, and how its teacher follows, as a client reports it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fedssl.model import Model, pairs
from fedssl.parts import Part


class Movement:
    """Watches one round of training. Nothing waits for the device before `measures`.

    Costs two copies of what a teacher follows and one of the other trained parts.

    Args:
        model: as the round begins.
        parts: of the method.
    """

    def __init__(self, model: Model, parts: Sequence[Part]) -> None:
        self._model = model
        self._followers = [part for part in parts if part.teaches]
        watched = [part.name for part in parts if part.trainable or part.teaches]
        # The parameters themselves: a cohort moves their values to where those of the other clients are.
        self._watched = {name: [p for p in model[name].parameters() if p.is_floating_point()] for name in watched}
        self._start = {name: _vector(parameters) for name, parameters in self._watched.items()}
        self._before: dict[str, Tensor] = {}

    def before_following(self) -> None:
        """Remember where the teacher is; called after the optimiser's last step and before the teacher's."""
        self._before = {part.name: _vector(_followed(self._model, part)[0]) for part in self._followers}

    @torch.no_grad()
    def measures(self) -> dict[str, float]:
        """The numbers, by name.

        PART_moved is how far a part moved in the round, relative to its norm at the start. For a teacher,
        TEACHER_gap is its distance from what it follows, relative to the norm of that (0: it is the student), and
        TEACHER_step the share of that distance that its last step covered (1 - decay; 0 where there was none).
        """
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for name, start in self._start.items():
            found[f"{name}_moved"] = _vector(self._watched[name]) - start, start
        for part in self._followers:
            teacher, student = map(_vector, _followed(self._model, part))
            found[f"{part.name}_gap"] = teacher - student, student
            before = self._before.get(part.name, teacher)
            found[f"{part.name}_step"] = teacher - before, student - before
        if not found:
            return {}
        far, whole = (self._lengths(side) for side in zip(*found.values(), strict=True))
        return dict(zip(found, _ratio(far, whole).tolist(), strict=True))

    def _lengths(self, vectors: Sequence[Tensor]) -> Tensor:
        device = next(self._model.parameters()).device  # a part without parameters is nowhere
        return torch.stack([torch.linalg.vector_norm(x).to(device) for x in vectors])


def _followed(model: Model, part: Part) -> tuple[list[Tensor], list[Tensor]]:
    """The teacher's and the student's parameters; buffers, such as batch statistics, have a life of their own."""
    found = [pair for pair in pairs(model, part) if isinstance(pair[1], nn.Parameter) and pair[1].is_floating_point()]
    return [teacher for teacher, _ in found], [student for _, student in found]


@torch.no_grad()
def _vector(tensors: Sequence[Tensor]) -> Tensor:
    """A copy of all as one: what follows are then a few calls, however many layers there are."""
    return torch.cat([x.reshape(-1) for x in tensors]) if tensors else torch.zeros(0)


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where nothing is left to divide by."""
    return torch.where(b > 0, a / torch.where(b > 0, b, 1.0), torch.zeros_like(a))
