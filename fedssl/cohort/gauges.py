"""What is measured of the steps of a cohort, for all of its clients at once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial

from torch import Tensor

from fedssl.client import Gauges, Training
from fedssl.cohort.stack import Rows, Stack
from fedssl.diagnostics import feature_stds
from fedssl.measures.movement import Movement
from fedssl.model import parameters


class CohortGauges:
    """Measures the clients of a cohort, but for those that have to measure themselves: where one stops before its last
    step, in which a teacher moves for the last time, and where the model has a parameter twice.
    """

    def __init__(self, trainings: Sequence[Training], stack: Stack) -> None:
        self._movement: Movement | None = None
        self._features: list[Tensor | None] = []  # and not the trainings, which would then keep each other
        names = parameters(trainings[0].model).keys()
        if names != stack.parameters.keys() or any(one.done < one.steps for one in trainings):
            for one in trainings:
                one.watch()
            return
        self._movement = Movement(stack.parameters, trainings[0].method.parts, together=True)
        for row, one in enumerate(trainings):
            one.joint = partial(self._of, row)

    def before_following(self, rows: Rows) -> None:
        """Remember the teachers of these clients, who have taken their last step."""
        if self._movement is not None:
            self._movement.before_following(rows.numbers)

    def after_steps(self, trainings: Sequence[Training]) -> None:
        """Remember the features that the last steps of all have left."""
        self._features = [one.features for one in trainings]

    def _of(self, row: int) -> Gauges:
        return self._found[row]

    @cached_property
    def _found(self) -> list[Gauges]:
        features = {row: x.float() for row, x in enumerate(self._features) if x is not None}
        stds = dict(zip(features, feature_stds(list(features.values())), strict=True))
        moved = [] if self._movement is None else self._movement.measures()
        return [Gauges(stds.get(row, 0.0), each) for row, each in enumerate(moved)]
