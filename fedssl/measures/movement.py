"""How far a round of local training moves a model's parts, and how its teacher follows, as a client reports it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

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
        self._watched: dict[str, list[Tensor]] = {
            name: [p for p in model[name].parameters() if p.is_floating_point()] for name in watched
        }
        self._start = {name: _copies(parameters) for name, parameters in self._watched.items()}
        self._before: dict[str, list[Tensor]] = {}

    def before_following(self) -> None:
        """Remember where the teacher is; called after the optimiser's last step and before the teacher's."""
        self._before = {part.name: _copies(a for a, _ in _followed(self._model, part)) for part in self._followers}

    @torch.no_grad()
    def measures(self) -> dict[str, float]:
        """The numbers, by name.

        PART_moved is how far a part moved in the round, relative to its norm at the start. For a teacher,
        TEACHER_gap is its distance from what it follows, relative to the norm of that (0: it is the student), and
        TEACHER_step the share of that distance that its last step covered (1 - decay; 0 where there was none).
        """
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for name, start in self._start.items():
            found[f"{name}_moved"] = _distance(self._watched[name], start), _length(start)
        for part in self._followers:
            teacher, student = (list(side) for side in zip(*_followed(self._model, part), strict=True))
            found[f"{part.name}_gap"] = _distance(teacher, student), _length(student)
            before = self._before.get(part.name, teacher)
            found[f"{part.name}_step"] = _distance(teacher, before), _distance(student, before)
        if not found:
            return {}
        device = next(self._model.parameters()).device  # a part without parameters is nowhere
        far, whole = (torch.stack([x.to(device) for x in side]) for side in zip(*found.values(), strict=True))
        return dict(zip(found, _ratio(far, whole).tolist(), strict=True))


def _followed(model: Model, part: Part) -> Iterator[tuple[Tensor, Tensor]]:
    """(teacher's, student's) parameters; buffers, such as batch statistics, have a life of their own."""
    return (pair for pair in pairs(model, part) if isinstance(pair[1], nn.Parameter) and pair[1].is_floating_point())


@torch.no_grad()
def _copies(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors]


def _distance(a: list[Tensor], b: list[Tensor]) -> Tensor:
    return _length(torch._foreach_sub(a, b) if a else ())


def _length(tensors: Sequence[Tensor]) -> Tensor:
    """Of all as one vector; as `torch.nn.utils.get_total_norm`, which sorts them by device and type first."""
    if not tensors:
        return torch.tensor(0.0)
    length: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm([x.float() for x in tensors])))
    return length


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where nothing is left to divide by."""
    return torch.where(b > 0, a / torch.where(b > 0, b, 1.0), torch.zeros_like(a))
