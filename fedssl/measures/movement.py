"""How far a round of local training moves a model's parts, and how its teacher follows, as a client reports it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedssl.parts import Part


class Movement:
    """Watches one round of training, of one client or of a cohort. Nothing waits for the device before `measures`.

    Costs two copies of what a teacher follows and one of the other trained parts.

    Args:
        parameters: of the model by name, as the round begins: the tensors that training changes.
        parts: of the method.
        together: whether the tensors are those of several clients, with a leading axis for the client.
    """

    def __init__(self, parameters: Mapping[str, Tensor], parts: Sequence[Part], together: bool = False) -> None:
        floating = {name: value for name, value in parameters.items() if value.is_floating_point()}
        self._lead, self._any = int(together), next(iter(parameters.values()))
        watched = [part.name for part in parts if part.trainable or part.teaches]
        self._watched = {name: _under(f"{name}.", floating) for name in watched}
        self._followed = {part.name: _followed(part, floating) for part in parts if part.teaches}
        self._start = {name: self._vector(tensors) for name, tensors in self._watched.items()}
        self._before: dict[str, Tensor] = {}

    def before_following(self, rows: Tensor | None = None) -> None:
        """Remember where the teacher is; called after the optimiser's last step and before the teacher's.

        Args:
            rows: (K,) int64, the clients whose last step this was; None: it was that of all.
        """
        for name, (teacher, _) in self._followed.items():
            now = self._vector(teacher)
            if rows is None:
                self._before[name] = now
            else:
                self._before.setdefault(name, now.clone()).index_copy_(0, rows, now.index_select(0, rows))

    @torch.no_grad()
    def measures(self) -> list[dict[str, float]]:
        """The numbers of each client, by name.

        PART_moved is how far a part moved in the round, relative to its norm at the start. For a teacher,
        TEACHER_gap is its distance from what it follows, relative to the norm of that (0: it is the student), and
        TEACHER_step the share of that distance that its last step covered (1 - decay; 0 where there was none).
        """
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for name, start in self._start.items():
            found[f"{name}_moved"] = self._vector(self._watched[name]) - start, start
        for name, both in self._followed.items():
            teacher, student = map(self._vector, both)
            found[f"{name}_gap"] = teacher - student, student
            before = self._before.get(name, teacher)
            found[f"{name}_step"] = teacher - before, student - before
        if not found:
            return [{} for _ in range(len(self._any) if self._lead else 1)]
        far, whole = (
            torch.stack([torch.linalg.vector_norm(x, dim=-1) for x in side], -1)
            for side in zip(*found.values(), strict=True)
        )
        rows = _ratio(far, whole).reshape(-1, len(found)).tolist()
        return [dict(zip(found, row, strict=True)) for row in rows]

    @torch.no_grad()
    def _vector(self, tensors: Sequence[Tensor]) -> Tensor:
        """A copy of all as one, (size,) or (clients, size): what follows are then a few calls for any layers."""
        if not tensors:  # a part without parameters
            return self._any.new_zeros(*self._any.shape[: self._lead], 0)
        return torch.cat([x.reshape(*x.shape[: self._lead], -1) for x in tensors], -1)


def _under(prefix: str, parameters: Mapping[str, Tensor]) -> list[Tensor]:
    return [value for name, value in parameters.items() if name.startswith(prefix)]


def _followed(part: Part, parameters: Mapping[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The teacher's and the student's parameters; buffers, such as batch statistics, have a life of their own."""
    names = [name for name in parameters for followed in part.follows if name.startswith(f"{followed}.")]
    return [parameters[f"{part.name}.{name}"] for name in names], [parameters[name] for name in names]


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where nothing is left to divide by."""
    return torch.where(b > 0, a / torch.where(b > 0, b, 1.0), torch.zeros_like(a))
