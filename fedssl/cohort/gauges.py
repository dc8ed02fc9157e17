"""What is measured of the steps of a cohort, for all of its clients at once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial

from fedssl.client import Gauges, Training
from fedssl.cohort.stack import Rows, Stack
from fedssl.diagnostics import feature_stds
from fedssl.measures.movement import Movement
from fedssl.model import parameters


class CohortGauges:
    """Gives each client of a cohort its `gauges`.

    Clients that stop before their last step, whose teacher they do not see move for the last time, and models with
    parameters that are there twice measure themselves.
    """

    def __init__(self, trainings: Sequence[Training], stack: Stack) -> None:
        self._trainings, self._movement = trainings, None
        names = parameters(trainings[0].model).keys()
        if names != stack.parameters.keys() or any(one.done < one.steps for one in trainings):
            for one in trainings:
                one.watch()
            return
        self._movement = Movement(stack.parameters, trainings[0].method.parts, together=True)
        for row, one in enumerate(trainings):
            one.gauges = partial(self._of, row)

    def before_following(self, rows: Rows) -> None:
        """Remember the teachers of these clients, who have taken their last step."""
        if self._movement is not None:
            self._movement.before_following(rows.numbers)

    def _of(self, row: int) -> Gauges:
        return self._found[row]

    @cached_property
    def _found(self) -> list[Gauges]:
        features = {row: one.features.float() for row, one in enumerate(self._trainings) if one.features is not None}
        stds = dict(zip(features, feature_stds(list(features.values())), strict=True))
        moved = [] if self._movement is None else self._movement.measures()
        return [Gauges(stds.get(row, 0.0), each) for row, each in enumerate(moved)]
