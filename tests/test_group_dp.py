"""Losses in disjoint groups: how far one record moves the sum, what chunks of a shuffled batch would do, whole runs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import execute, final_arrays, tiny
from test_methods import job_of
from test_pair_dp import batch_of, duplicates, flat, model_of, without
from torch import Tensor, nn
from torch.func import functional_call, grad

from fedssl import config
from fedssl.config import Plan
from fedssl.errors import ConfigError, PrivacyError
from fedssl.job.setup import build_model
from fedssl.method import Batch, SSLMethod, Step
from fedssl.methods.sigmoid import SigmoidPairs
from fedssl.methods.simclr import SimCLR
from fedssl.methods.vicreg import VICReg
from fedssl.privacy.coupled import groups
from fedssl.privacy.coupled.group_dp import GroupDP
from fedssl.privacy.noise import Noise
from fedssl.privacy.per_record import clipped_sum, trainable

Compose = Callable[..., Plan]
STEP = Step(1, 2, 0, 2)
CPU = torch.device("cpu")
SIZES = {"hidden": 5, "out": 4, "norm": "layer"}
METHODS: dict[str, SSLMethod] = {
    **{f"simclr-{t}": SimCLR(temperature=t, **SIZES) for t in (1.0, 0.5, 0.2)},
    "sigmoid": SigmoidPairs(**SIZES),
    "vicreg": VICReg(**SIZES),
}
CLIP, N = 0.01, 8
every_method = pytest.mark.parametrize("name", METHODS)


def noise_of(seed: int = 0) -> Noise:
    return Noise(np.random.default_rng(seed), False, CPU)


def clipped(method: SSLMethod, model: nn.ModuleDict, batch: Batch, chunks: list[list[int]], share: float) -> Tensor:
    """(P,) the sum over groups of positions of their clipped gradients."""
    total = torch.zeros(sum(p.numel() for p in trainable(model)), dtype=torch.float64)
    for chunk in chunks:
        if len(chunk) < 2:
            continue
        rows = torch.tensor([chunk])
        for records in groups.gradients(method, model, batch, STEP, rows, share * len(chunk), at_once=3):
            total = total + flat(clipped_sum(records.gradients, CLIP))
    return total


def attacked(
    method: SSLMethod, model: nn.ModuleDict, n: int, objective: Callable[[Callable[..., Tensor]], Tensor]
) -> Batch:
    """100 steps of Adam on the inputs of n records, to make the objective large."""
    inputs = torch.stack(list(batch_of(n).views)).requires_grad_()  # (2, n, WIDTH)
    optimizer = torch.optim.Adam([inputs], lr=0.1)
    values = dict(model.named_parameters())

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, views: Tensor) -> Tensor:
            return method.loss(self.model, Batch(list(views), torch.arange(views.shape[1])), STEP).loss

    net = Loss()
    named = {f"model.{key}": value for key, value in values.items()}

    def contribution(rows: list[int]) -> Tensor:
        found = grad(lambda p: functional_call(net, p, (inputs[:, rows],)))(named)
        whole = torch.cat([g.flatten() for g in found.values()]) * len(rows)
        return whole * torch.clamp(CLIP / whole.norm().clamp(min=1e-30), max=1.0)

    best, kept = -1.0, inputs.detach().clone()
    for _ in range(100):
        value = objective(contribution)
        if value.item() > best:
            best, kept = value.item(), inputs.detach().clone()
        optimizer.zero_grad()
        (-value).backward()
        inputs.grad.nan_to_num_()
        optimizer.step()
    return Batch(list(kept), torch.arange(n))


def shifted(
    method: SSLMethod, model: nn.ModuleDict, batch: Batch, before: list[list[int]], after: list[list[int]]
) -> float:
    """How far the sums over these two ways to group the batch are from each other, over the clip norm."""
    return float((clipped(method, model, batch, before, 1) - clipped(method, model, batch, after, 1)).norm()) / CLIP


@every_method
def test_slots_move_by_the_clip_norm_and_labels_by_twice(name: str) -> None:
    """Random records, duplicates beside an outlier, and an adversary on the inputs of a group of four."""
    method = METHODS[name]
    model = model_of(method)
    together, rest = [0, 1, 2, 3], [[4, 5, 6, 7]]

    def against(contribution: Callable[..., Tensor]) -> Tensor:
        return (contribution(together) - contribution(together[:3])).norm()

    batches = [batch_of(N, seed) for seed in range(3)] + [duplicates(N)]
    batches.append(attacked(method, model, N, against))
    slots = [shifted(method, model, batch, [together, *rest], rest) for batch in batches]
    labels = [shifted(method, model, batch, [together, *rest], [together[:3], *rest]) for batch in batches]
    assert max(slots) <= 1 + 1e-6
    assert max(labels) <= 2 + 1e-6
    assert labels[-1] > 1.0 or name == "vicreg", "so noise relative to the clip norm alone would not do"


def test_chunks_of_a_shuffled_batch_break_the_bound() -> None:
    """A record less shifts all later chunks: the sum of four groups moves by more than twice the clip norm."""
    method = METHODS["simclr-0.5"]
    model = model_of(method)
    n = 16
    order = list(range(n))
    before, after = ([rows[i : i + 4] for i in range(0, len(rows), 4)] for rows in (order, order[1:]))

    def against(contribution: Callable[..., Tensor]) -> Tensor:
        return (sum(map(contribution, before)) - sum(map(contribution, after))).norm()

    batch = attacked(method, model, n, against)
    assert shifted(method, model, batch, before, after) > 3.0
    kept = [[i for i in chunk if i] for chunk in before]  # labels that stay with their records
    assert shifted(method, model, batch, before, kept) <= 2 + 1e-6


def test_emptying_a_slot_takes_its_group_away_and_no_other() -> None:
    present = np.ones(30, dtype=bool)
    whole = groups.slots(present, 4, np.random.default_rng(3))
    assert whole.shape == (7, 4), "the two slots that are left over belong to no group"
    assert len(set(whole.flatten())) == 28
    for slot in range(30):
        holed = present.copy()
        holed[slot] = False
        left = groups.slots(holed, 4, np.random.default_rng(3))
        expected = [row.tolist() for row in whole if slot not in row]
        assert left.tolist() == expected


def test_labels_are_uniform_independent_and_cover_every_record_once() -> None:
    drawn = torch.stack([groups.labels(2, 4, noise_of(seed), CPU) for seed in range(4000)])
    counts = Counter(map(tuple, drawn.tolist()))
    assert len(counts) == 16
    assert max(abs(count - 250) for count in counts.values()) < 5 * math.sqrt(250)
    label = groups.labels(50, 7, noise_of(), CPU)
    found = groups.members(label)
    assert sorted(torch.cat([rows.flatten() for rows in found.values()]).tolist()) == list(range(50))
    for size, rows in found.items():
        assert rows.shape[1] == size
        assert all(len(set(label[row].tolist())) == 1 for row in rows)


def test_slots_are_sampled_whole_and_each_at_its_rate() -> None:
    planned = GroupDP(size=4, epsilon=None, noise_multiplier=1.0).planned(42, 8, 400, 1)
    batches = list(planned.batches(42, 8, 400, np.random.default_rng(0)))
    assert len(batches) == planned.steps == 400 * 5
    table = {tuple(row) for batch in batches for row in batch.view(-1, 4).tolist()}
    assert len(table) == 10, "the same groups in each step"
    seen = Counter(tuple(row) for batch in batches for row in batch.view(-1, 4).tolist())
    rate = planned.sample_rate
    assert all(abs(c - 2000 * rate) < 5 * math.sqrt(2000 * rate * (1 - rate)) for c in seen.values())
    assert any(not len(batch) for batch in batches), "empty samples are steps as well"
    few = GroupDP(size=8, epsilon=None, noise_multiplier=1.0).planned(5, 4, 2, 1)
    assert not any(len(batch) for batch in few.batches(5, 4, 2, np.random.default_rng(0)))
    assert list(GroupDP(size=4, secure=True).planned(12, 4, 1, 1).batches(12, 4, 1, np.random.default_rng(0)))


def noisy(method: SSLMethod, model: nn.ModuleDict, batch: Batch, **options: object) -> Tensor:
    mechanism = GroupDP(**{"epsilon": None, "noise_multiplier": 1e-12, "size": 4, "clip_norm": CLIP, **options})
    planned = mechanism.planned(20, 8, 1, 1)
    return flat(mechanism.noisy_sum(method, model, batch, STEP, planned, noise_of())[0])


@pytest.mark.parametrize("scheme", ["slots", "labels"])
@every_method
def test_the_sum_is_that_of_the_groups_own_losses(name: str, scheme: str) -> None:
    method, batch = METHODS[name], batch_of(N)
    model = model_of(method)
    label = groups.labels(N, 2, noise_of(), CPU)
    chunks = [[0, 1, 2, 3], [4, 5, 6, 7]]
    if scheme == "labels":
        chunks = [(label == b).nonzero().flatten().tolist() for b in (0, 1)]
    expected = torch.zeros(())
    for chunk in (c for c in chunks if len(c) > 1):
        own = Batch([v[chunk] for v in batch.views], batch.index[chunk])
        loss = method.loss(model, own, STEP).loss * len(chunk) / 4
        gradient = flat(list(torch.autograd.grad(loss, trainable(model))))
        expected = expected + gradient * min(1.0, CLIP / float(gradient.norm())) * 4
    for engine in ("vmap", "loop"):
        found = noisy(method, model, batch, scheme=scheme, engine=engine)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("scheme", ["slots", "labels"])
def test_empty_samples_single_records_and_records_that_are_no_numbers(scheme: str) -> None:
    method, batch = METHODS["simclr-0.5"], batch_of(N)
    model = model_of(method)
    assert noisy(method, model, Batch([], torch.arange(0)), scheme=scheme).norm() < 1e-9
    if scheme == "labels":
        assert noisy(method, model, without(batch_of(2), 1), scheme=scheme).norm() < 1e-9, "nobody to meet"
    broken = replace(batch, views=[v.index_fill(0, torch.tensor([1]), math.nan) for v in batch.views])
    found = noisy(method, model, broken, scheme=scheme)
    assert found.isfinite().all()
    if scheme == "slots":
        rest = Batch([v[4:] for v in batch.views], batch.index[4:])
        torch.testing.assert_close(found, noisy(method, model, rest, scheme=scheme), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("scheme", "times"), [("slots", 1), ("labels", 2)])
def test_noise_is_relative_to_the_sensitivity(scheme: str, times: int) -> None:
    method = METHODS["simclr-0.5"]
    model = model_of(method)
    model["encoder"].append(nn.Linear(200, 200))
    drawn = noisy(method, model, Batch([], torch.arange(0)), scheme=scheme, noise_multiplier=1.5)
    assert drawn.std().item() == pytest.approx(1.5 * times * CLIP * 4, rel=0.03), "times the size, after the noise"


def test_refusals_name_the_way_out(plan: Compose) -> None:
    with pytest.raises(ConfigError, match=r"size=1 leaves each record alone.*privacy=example"):
        GroupDP(size=1)
    with pytest.raises(ConfigError, match="scheme='chunks' is unknown: use slots or labels; a shuffled batch"):
        GroupDP(scheme="chunks")
    with pytest.raises(ConfigError, match="engine='hooks' is unknown: use vmap or loop"):
        GroupDP(engine="hooks")
    for name, why in (("moco", "queue"), ("dino", "earlier batches"), ("instance", "bank")):
        with pytest.raises(PrivacyError, match=f"privacy=groups has no proof for .*{why}.*aggregation=client_dp"):
            GroupDP().check(job_of(name, "method.norm=group").method)
    GroupDP().check(job_of("vicreg", "method.norm=group").method)
    GroupDP().check(job_of("byol", "method.norm=group").method)
    with pytest.raises(
        PrivacyError,
        match=r"SimCLR, which has batch normalisation in its heads: set method\.norm=group, "
        r"or use privacy=pairs method\.norm=group, privacy=example with method=byol method\.norm=group, "
        r"method=mae, or aggregation=client_dp, under which every method is valid$",
    ):
        plan("privacy=groups")
    graphs = job_of("simclr", "method.norm=group", modality="graphs")
    data = graphs.data.load().train
    live = (build_model(graphs, data.shape), data.shard(np.arange(8), 0), graphs.data.augment)
    GroupDP().admit(graphs.method, *live)
    with pytest.raises(PrivacyError, match=r"graphs of this run can be cut but not regrouped.*scheme=slots"):
        GroupDP(scheme="labels").admit(graphs.method, *live)


@pytest.mark.parametrize("options", [(), ("privacy.scheme=labels",), ("method=vicreg",)])
def test_a_federation_trains_in_groups(options: tuple[str, ...], plan: Compose) -> None:
    rundir = execute(plan("method.norm=group", "privacy=groups", "privacy.size=3", "privacy.delta=0.001", *options))
    assert all(np.isfinite(value).all() for value in final_arrays(rundir).values())
    said = rundir.read("privacy.json")
    assert 0 < said["epsilon"] <= 8.0
    slots = "privacy.scheme=labels" not in options
    assert ("slot" in said["relation"]) == slots
    assert any("number of" in hole for hole in said["not_covered"])
    assert {"loss", "feature_std"}.isdisjoint(rundir.rows("clients.jsonl")[0])


@pytest.mark.parametrize(("method", "modality"), [("simclr", "graphs"), ("clip", "pairs")])
def test_views_that_are_no_tensors_train_in_slots(method: str, modality: str, tmp_path: Path) -> None:
    options = ("method.norm=group", "privacy=groups", "privacy.size=2", "privacy.delta=0.001", "federation.rounds=1")
    overrides = tiny(f"method={method}", *options, f"out={tmp_path}", "name=cut", modality=modality)
    assert all(np.isfinite(value).all() for value in final_arrays(execute(config.compose(overrides))).values())


def test_vmap_and_a_plain_loop_agree() -> None:
    method, batch = METHODS["vicreg"], batch_of(N)
    model = model_of(method)
    rows = torch.arange(N).view(4, 2)
    one, other = (
        list(groups.gradients(method, model, batch, STEP, rows, 0.5, at_once=3, vectorised=v)) for v in (True, False)
    )
    for a, b in zip(one, other, strict=True):
        for x, y in zip(a.gradients, b.gradients, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(a.losses, b.losses)
        torch.testing.assert_close(a.features, b.features)
