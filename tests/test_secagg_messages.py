"""Secure aggregation over Flower messages: the steps in order, drop-outs, and what a client keeps."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from flwr.app import Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp

from fedssl.errors import ProtocolError
from fedssl.flower import codec
from fedssl.flower.in_process import InProcessGrid
from fedssl.flower.rounds import exchange
from fedssl.flower.secagg import client
from fedssl.flower.secagg.records import SECAGG
from fedssl.flower.secagg.server import Exchange

CLIENTS = 5
VECTORS = {c: np.array([c, 2**31 + c, 7], np.uint32) for c in range(CLIENTS)}


def app_that_fails(step: str = "", who: tuple[int, ...] = ()) -> ClientApp:
    """A ClientApp of which some clients fail at a step."""
    app = ClientApp()

    def failing(context: Context, here: str) -> None:
        if here == step and int(context.node_config["partition-id"]) in who:
            raise RuntimeError("the device is gone")

    for name in ("advertise", "share", "reveal"):

        def answer(message: Message, context: Context, name: str = name) -> Message:
            failing(context, name)
            reply: Message = getattr(client, name)(message, context)
            return reply

        app.query(f"secagg_{name}")(answer)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        failing(context, "mask")
        masked = client.mask(message, context, VECTORS[int(context.node_config["partition-id"])])
        return Message(codec.reply({SECAGG: masked}, {"num-examples": 1}), reply_to=message)

    return app


def run(grid: InProcessGrid, threshold: int = 3) -> Iterator[Exchange]:
    """One round; what it adds up is asked for by the caller."""
    nodes = {c: c + 1 for c in range(CLIENTS)}
    opened = Exchange.open(grid, nodes, "run, round 1", threshold, 10.0)
    yield opened
    messages = []
    for c in opened.letters:
        message = Message(RecordDict(), nodes[c], MessageType.TRAIN)
        opened.instruct(message, c)
        messages.append(message)
    for reply in exchange(grid, messages, 10.0):
        if reply.has_content():
            opened.add(reply.metadata.src_node_id - 1, codec.decode(reply.content.array_records[codec.ARRAYS])[SECAGG])
    yield opened


def outcome(grid: InProcessGrid, threshold: int = 3) -> tuple[list[int], np.ndarray]:
    *_, last = run(grid, threshold)
    return last.survivors, last.close()


@pytest.mark.parametrize("step", ["", "advertise", "share", "mask", "reveal"])
def test_who_fails_at_a_step_is_recovered(step: str) -> None:
    with InProcessGrid(app_that_fails(step, (1, 3)), CLIENTS, workers=2, fail_fast=False) as grid:
        survivors, total = outcome(grid)
        assert sorted(survivors) == ([0, 1, 2, 3, 4] if step in ("", "reveal") else [0, 2, 4])
        np.testing.assert_array_equal(total, sum(VECTORS[c] for c in survivors))
        answered = [c for c in range(CLIENTS) if step == "" or c not in (1, 3)]
        for c in answered:
            assert SECAGG not in grid.context(c + 1).state, "secrets outlive the round"


@pytest.mark.parametrize("step", ["advertise", "share", "mask", "reveal"])
def test_too_few_are_one_sentence(step: str) -> None:
    with (
        InProcessGrid(app_that_fails(step, (0, 1, 3)), CLIENTS, fail_fast=False) as grid,
        pytest.raises(ProtocolError, match="2 clients .* and the threshold of secure aggregation is 3"),
    ):
        outcome(grid)


def test_a_step_is_done_once_and_in_order() -> None:
    with InProcessGrid(app_that_fails(), CLIENTS) as grid:
        steps = run(grid)
        opened = next(steps)
        with pytest.raises(
            ProtocolError, match="client 0 was asked for a step of secure aggregation that it is not at"
        ):
            opened.survivors = [0, 1, 2]
            opened.total = np.zeros(3, np.uint32)
            opened.close()
        with pytest.raises(ProtocolError, match="is not at, so it answers nothing"):
            list(opened._ask("secagg_share", [0], {}))
        next(steps)
    with InProcessGrid(app_that_fails(), CLIENTS) as grid:
        *_, last = run(grid)
        last.close()
        with pytest.raises(ProtocolError, match="each step is done once"):
            last.close()


def test_the_context_holds_no_seed_once_the_vector_is_sent() -> None:
    with InProcessGrid(app_that_fails(), CLIENTS) as grid:
        steps = run(grid)
        next(steps)
        assert {"sealing-seed", "masking-seed", "own-seed"} <= set(grid.context(1).state.config_records[SECAGG])
        next(steps)
        held = grid.context(1).state.config_records[SECAGG]
        assert set(held) == {"step", "client", "session", "threshold", "shares", "shares-of"}


def test_another_size_is_refused() -> None:
    opened = Exchange(InProcessGrid(ClientApp(), 1), {}, None, 1.0)  # type: ignore[arg-type]
    opened.add(0, np.zeros(3, np.uint32))
    for wrong in (np.zeros(4, np.uint32), np.zeros(3, np.uint64)):
        with pytest.raises(ProtocolError, match="client 1 sent . numbers of"):
            opened.add(1, wrong)
