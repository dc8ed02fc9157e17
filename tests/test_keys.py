"""The queue of keys against a list, and its life across rounds."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from conftest import execute, final_arrays
from hypothesis import given, settings
from hypothesis import strategies as st

from fedssl import seeds
from fedssl.config import Plan
from fedssl.errors import ConfigError, PrivacyError
from fedssl.flower import state_files
from fedssl.networks.keys import KeyBank, KeyQueue


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 7), st.lists(st.integers(1, 10), max_size=6))
def test_the_queue_holds_the_last_keys(size: int, batches: list[int]) -> None:
    queue, pushed = KeyQueue(size, 3), []
    for i, count in enumerate(batches):
        keys = torch.randn(count, 3, generator=seeds.torch_stream(0, "keys", i))
        queue.push(keys, torch.full((count,), i))
        pushed += list(torch.nn.functional.normalize(keys, dim=1))
    assert int(queue.pushed) == len(pushed)
    held = {tuple(row.tolist()) for row in queue.keys if row.abs().sum() > 0}
    assert held == {tuple(row.tolist()) for row in pushed[-size:]}
    for place, row in enumerate(pushed):  # each key lies where its number says, until it is overwritten
        if place >= len(pushed) - size:
            assert torch.equal(queue.keys[place % size], row)


def test_an_empty_queue_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        KeyQueue(0, 3)


def test_the_queue_survives_rounds_and_stays_at_home(plan: Callable[..., Plan]) -> None:
    """Defect of a public code: the queue was wiped at each round's start. Here it grows from round to round."""
    rundir = execute(plan("method=moco", "method.queue=500", "federation.rounds=3"))
    assert not any(key.startswith(("queue", "teacher")) for key in final_arrays(rundir))
    sizes = {row["client"]: row["examples"] for row in rundir.rows("clients.jsonl")}
    for client, examples in sizes.items():
        path = state_files.newest(rundir.clients, client, 99)
        assert path is not None
        local = state_files.read(path).local
        assert local["queue.pushed"] == 3 * examples
        norms = np.linalg.norm(local["queue.keys"], axis=1)
        assert (norms > 0.99).sum() == 3 * examples


def test_a_queue_is_never_uploaded(plan: Callable[..., Plan]) -> None:
    with pytest.raises(PrivacyError, match="share.queue=local"):
        execute(plan("method=moco", "strategy.share.queue=merge"))


def test_moco_with_a_collapsed_network_knows_nothing(plan: Callable[..., Plan]) -> None:
    """All keys and queries alike: log(1 + K)."""
    from fedssl.job.setup import build_model
    from fedssl.method import Batch, Step
    from fedssl.model import derive

    job = plan("method=moco", "method.queue=30").job
    model = build_model(job, (3, 8, 8))
    with torch.no_grad():
        for name, parameter in model["projector"].named_parameters():
            parameter.fill_(1.0 if name.endswith("bias") else 0.0)
    derive(model, job.method.parts, ["teacher."])
    views = [torch.rand(4, 3, 8, 8), torch.rand(4, 3, 8, 8)]
    step = Step(1, 1, 0, 1)
    for _ in range(8):
        out = job.method.loss(model, Batch(views, torch.arange(4)), step)
        job.method.after_step(model, out, step)
    out = job.method.loss(model, Batch(views, torch.arange(4)), step)
    assert out.loss.item() == pytest.approx(np.log(31), rel=1e-5)


class Plain:
    """An augmentation that leaves examples alone, and examples that are their own numbers."""

    modality = "images"

    def views(self, x: torch.Tensor, generator: torch.Generator, count: int) -> list[torch.Tensor]:
        return [x] * count

    def plain(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Numbers:
    def __len__(self) -> int:
        return 9

    def batch(self, index: torch.Tensor) -> torch.Tensor:
        return torch.stack([index.float() + 1, torch.ones(len(index))], 1)


def expected(index: list[int]) -> torch.Tensor:
    return torch.nn.functional.normalize(Numbers().batch(torch.tensor(index)), dim=1)


def test_on_merge_keeps_clears_or_reencodes_a_queue() -> None:
    encoder = torch.nn.Identity()
    queue = KeyQueue(4, 2)
    queue.refresh("reencode", encoder, Numbers(), Plain())
    assert not queue.keys.any(), "nothing to reencode in an empty queue"
    queue.push(torch.randn(3, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([5, 0, 7]))
    before = queue.keys.clone()
    queue.refresh("keep", encoder, Numbers(), Plain())
    assert torch.equal(queue.keys, before)
    queue.refresh("reencode", encoder, Numbers(), Plain())
    torch.testing.assert_close(queue.keys[:3], expected([5, 0, 7]))
    assert not queue.keys[3].any(), "a place that was never filled stays empty"
    queue.push(torch.ones(2, 2), torch.tensor([1, 2]))
    assert queue.index.tolist() == [2, 0, 7, 1]
    queue.refresh("clear", encoder, Numbers(), Plain())
    assert (int(queue.pushed), queue.index.tolist()) == (0, [-1] * 4)
    assert not queue.keys.any()


def test_a_bank_is_filled_first_then_moves_with_its_momentum() -> None:
    encoder, bank = torch.nn.Identity(), KeyBank(9, 2)
    bank.refresh("keep", encoder, Numbers(), Plain())
    torch.testing.assert_close(bank.keys, expected(list(range(9))))
    new = torch.tensor([[0.0, 2.0], [3.0, 0.0]])
    bank.update(new, torch.tensor([4, 8]), 0.5)
    mixed = torch.nn.functional.normalize((expected([4, 8]) + torch.nn.functional.normalize(new, dim=1)) / 2, dim=1)
    torch.testing.assert_close(bank.keys[[4, 8]], mixed)
    torch.testing.assert_close(bank.keys[:4], expected(list(range(4))))
    bank.refresh("keep", encoder, Numbers(), Plain())
    torch.testing.assert_close(bank.keys[[4, 8]], mixed)
    bank.refresh("reencode", encoder, Numbers(), Plain())
    torch.testing.assert_close(bank.keys, expected(list(range(9))))
    bank.refresh("clear", encoder, Numbers(), Plain())
    assert not bank.keys.any()


@pytest.mark.parametrize("method", ["moco", "instance"])
@pytest.mark.parametrize("on_merge", ["keep", "clear", "reencode"])
def test_every_way_to_merge_runs(plan: Callable[..., Plan], method: str, on_merge: str) -> None:
    run = execute(plan(f"method={method}", f"method.on_merge={on_merge}"))
    assert not any(key.startswith(("queue", "bank")) for key in final_arrays(run))


def test_another_way_to_merge_is_refused(plan: Callable[..., Plan]) -> None:
    with pytest.raises(ConfigError, match="keep, clear, reencode"):
        plan("method=moco", "method.on_merge=drop")


def test_a_bank_fits_its_client_and_stays_at_home(plan: Callable[..., Plan]) -> None:
    run = execute(plan("method=instance", "partition.alpha=0.5", "data.train=90"))
    sizes = {row["client"]: row["examples"] for row in run.rows("clients.jsonl")}
    assert len(set(sizes.values())) > 1
    for client, examples in sizes.items():
        path = state_files.newest(run.clients, client, 99)
        assert path is not None
        assert state_files.read(path).local["bank.keys"].shape == (examples, 8)
    with pytest.raises(PrivacyError, match="share.bank=local"):
        execute(plan("method=instance", "strategy.share.bank=merge", name="other"))
