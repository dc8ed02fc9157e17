"""FedX, FedCA and FLESD: losses against loops, ensembles by hand, what travels, refusals, and whole runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import assert_same, execute, final_arrays, public_like, tiny
from test_laws import interrupted, metrics
from test_methods import STEP, batch_of, fit_one, job_of, model_of
from test_strategies import NOW, one_round
from torch import Tensor

from fedssl import client, config
from fedssl.config import Plan
from fedssl.errors import ConfigError, PrivacyError
from fedssl.export import load_encoder
from fedssl.flower.rule import Own
from fedssl.job.setup import build_model, public_of, workshop_of
from fedssl.losses import jensen_shannon, kullback_leibler, nt_xent, relations
from fedssl.method import Batch
from fedssl.methods.common.wrapper import Once
from fedssl.model import pairs, tensors, to_arrays
from fedssl.networks.keys import spread
from fedssl.parts import Arrays, Layout, Part, Share, part_of, resolve_shares
from fedssl.workshop import Lesson, ensemble, teach
from strategies import rules
from strategies.base import Update
from strategies.exchange.fedca import FedCA
from strategies.exchange.flesd import FLESD
from strategies.fedavg import FedAvg

Compose = Callable[..., Plan]
PUBLIC = tuple(public_like(tiny()))
FEDCA = ("method=fedca", "strategy=fedca", "payload.allow=[projections]", "method.dictionary=5")
FEDCA_WIDE = (*FEDCA, "method.alignment=0.01", "method.public_batch=8", "strategy.base_epochs=2", *PUBLIC)
FLESD_RUN = ("method=flesd", "strategy=flesd", *PUBLIC, "method.public_batch=16", "strategy.epochs=2")
MIXED = ("encoder@encoders.a=conv4", "encoders.a.width=4", "encoders.a.dim=12", "encoder@encoders.b=resnet18")
MIXED_RUN = (*FLESD_RUN, *MIXED, "encoders.b.width=4")


def vectors(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def softmax(scores: list[float], t: float) -> list[float]:
    raw = [math.exp(s / t) for s in scores]
    return [r / sum(raw) for r in raw]


def slow_relations(z: Tensor, anchors: Tensor, t: float) -> list[list[float]]:
    return [
        softmax([cosine(z[i], anchors[j]) for j in range(len(z)) if j != i], t) if len(z) > 1 else []
        for i in range(len(z))
    ]


def slow_js(p: list[float], q: list[float]) -> float:
    middle = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    kl = [sum(a * math.log(a / m) for a, m in zip(one, middle, strict=True)) for one in (p, q)]
    return sum(kl) / 2


def slow_nt_xent(z1: Tensor, z2: Tensor, t: float, others: list[Tensor]) -> float:
    """The mean over all 2B views of -log of the partner's share among all other views and the others."""
    z, b, total = torch.cat([z1, z2]), len(z1), 0.0
    for i in range(2 * b):
        near = math.exp(cosine(z[i], z[(i + b) % (2 * b)]) / t)
        every = [z[j] for j in range(2 * b) if j != i] + others
        total -= math.log(near / sum(math.exp(cosine(z[i], other) / t) for other in every))
    return total / (2 * b)


# Losses ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 5])
def test_relations_and_their_divergences_equal_loops(n: int) -> None:
    z1, z2, anchors, t = vectors(n, 4), vectors(n, 4, seed=1), vectors(n, 4, seed=2), 0.3
    ways = [relations(z, anchors, temperature=t) for z in (z1, z2)]
    slow = [slow_relations(z, anchors, t) for z in (z1, z2)]
    for fast, loop in zip(ways, slow, strict=True):
        torch.testing.assert_close(fast.exp(), torch.tensor(loop, dtype=torch.float64).view(n, n - 1))
    for i, value in enumerate(jensen_shannon(*ways).tolist()):
        assert value == pytest.approx(slow_js(slow[0][i], slow[1][i]), abs=1e-12)
        assert 0 <= value <= math.log(2)
    for i, value in enumerate(kullback_leibler(*ways).tolist()):
        want = sum(p * math.log(p / q) for p, q in zip(slow[0][i], slow[1][i], strict=True))
        assert value == pytest.approx(want, abs=1e-12)
    assert jensen_shannon(ways[0], ways[0]).abs().max() < 1e-12


def test_divergences_are_bounded_and_have_right_gradients() -> None:
    sure = torch.tensor([[100.0, 0.0], [0.0, 100.0]]).log_softmax(1)
    torch.testing.assert_close(jensen_shannon(sure, sure.flip(0)), torch.full((2,), math.log(2)))
    x, y = (vectors(3, 4, seed=i).requires_grad_() for i in (3, 4))
    check: Any = torch.autograd.gradcheck
    assert check(lambda a, b: jensen_shannon(*(relations(z, b, temperature=0.5) for z in (a, b))), (x, y))
    assert check(lambda a: kullback_leibler(relations(y, y, temperature=0.5), relations(a, a, temperature=0.5)), (x,))
    kullback_leibler(relations(y, y, temperature=0.5), relations(x, x, temperature=0.5)).sum().backward()
    assert y.grad is None, "the target gets no gradient"


def test_further_negatives_of_nt_xent_equal_loops_and_zeros_count_for_nothing() -> None:
    z1, z2, others, t = vectors(3, 4), vectors(3, 4, seed=1), vectors(5, 4, seed=2), 0.4
    others[[1, 4]] = 0
    got = nt_xent(z1, z2, others, temperature=t).mean().item()
    assert got == pytest.approx(slow_nt_xent(z1, z2, t, [others[i] for i in (0, 2, 3)]), rel=1e-12)
    none = nt_xent(z1, z2, torch.zeros_like(others), temperature=t)
    torch.testing.assert_close(none, nt_xent(z1, z2, temperature=t), rtol=0, atol=0)


# FedX --------------------------------------------------------------------------------------------------------------


def test_fedx_is_its_terms() -> None:
    job = job_of(
        "fedx", "method.distillation=0.5", "method.relational=2.0", "method.base.norm=none", "method.norm=none"
    )
    model, batch = model_of(job).double(), batch_of(job, 5)
    batch = Batch([view.double() for view in batch.views], batch.index)
    with torch.no_grad():
        for parameter in model["reference"].parameters():
            parameter += 0.01 * torch.arange(parameter.numel()).view_as(parameter).sin()
    z = [model["projector"](model["encoder"](view)).detach() for view in batch.views]
    h = [model["bridge"](x).detach() for x in z]
    told = model["reference"]["projector"](model["reference"]["encoder"](batch.views[1])).detach()
    near, far = (
        sum(slow_js(p, q) for p, q in zip(*(slow_relations(v, a, 0.1) for v in views), strict=True)) / 5
        for views, a in ((z, z[1]), (h, told))
    )
    base = slow_nt_xent(z[0], z[1], 0.5, [])
    want = base + 0.5 * slow_nt_xent(h[0], told, 0.1, []) + 2.0 * (near + far)
    out = job.method.loss(model, batch, STEP)
    assert out.loss.item() == pytest.approx(want, rel=1e-9)
    assert set(out.aux) == {"distillation", "relational_local", "relational_global"}


def test_the_reference_is_what_the_round_began_with() -> None:
    """Copied when a round begins, not moved in it, whoever owns it; and it costs no bytes."""
    job = job_of("fedx", "method.base.norm=batch")
    model = model_of(job)
    fit_one(job, model)
    started = to_arrays(model)
    fit_one(job, model, round=2)
    (part,) = (part for part in job.method.parts if part.frozen)
    for key in started:
        if part_of(key) == "reference":
            assert_same({"": to_arrays(model)[key]}, {"": started[key.partition(".")[2]]})
    assert any(not torch.equal(a, b) for a, b in pairs(model, part)), "the model itself has moved on"
    shares = resolve_shares(job.method.parts, {"*:norm": "local"}, list(started), frozenset(started))
    assert {share for key, share in shares.items() if part_of(key) == "reference"} == {Share.derived}
    with pytest.raises(ConfigError, match=r"reference is a copy of how a round began"):
        resolve_shares(job.method.parts, {"reference": "local"}, [], frozenset())
    for strategy in ("fedema", "fedu"):  # they keep teachers at home, and this is none
        assert "reference" not in config.compose([*tiny("method=fedx"), f"strategy={strategy}"]).job.ownership


@pytest.mark.parametrize("base", ["simclr", "moco", "byol", "simsiam", "dino", "instance"])
def test_fedx_wraps_any_method_with_a_projector(base: str, plan: Compose) -> None:
    made = plan("method=fedx", f"method@method.base={base}", "local.decorrelation=0.1", "method.hidden=16")
    rows = execute(made).rows("clients.jsonl")
    assert all(row["distillation"] > 0 for row in rows)
    assert rows[0]["relational_global"] >= 0
    assert {"bridge", "reference"} <= {part.name for part in made.job.method.parts}


@pytest.mark.parametrize(("base", "word"), [("mae", "projector"), ("fedx", "'bridge'")])
def test_fedx_refuses_a_base_that_it_cannot_compare(base: str, word: str) -> None:
    with pytest.raises(ConfigError, match=f"has .*{word}"):
        config.compose(["method=fedx", f"method@method.base={base}"])


def test_the_strategy_of_a_wrapped_method_is_named() -> None:
    with pytest.raises(ConfigError, match="use strategy=flesd"):
        config.compose(["method=fedx", "method@method.base=flesd", "data@public=synthetic"])


def test_a_wrapper_shares_the_passes_of_its_base() -> None:
    job = job_of("fedx", "method.base.norm=batch")
    model = model_of(job)
    seen: list[int] = []
    model["encoder"].register_forward_hook(lambda *_: seen.append(1))
    job.method.loss(model, batch_of(job, 4), STEP)
    assert len(seen) == 2
    once, x = Once(torch.nn.Linear(2, 2)), torch.zeros(1, 2)
    assert once(x) is once(x)
    assert once(x) is not once(x.clone())
    with torch.no_grad():
        assert not once(x).requires_grad


def test_9_weights_under_partial_participation_are_those_of_who_came(plan: Compose) -> None:
    """They were shares of all clients' examples, of the first ones: the model shrank. Here they sum to 1."""
    merged = one_round(FedAvg(), NOW, {0: 1.0, 1: -1.0}, {0: 1, 1: 3})  # two came, however many there are
    np.testing.assert_allclose(merged["encoder.weight"] - NOW["encoder.weight"], (1 - 3) / 4, rtol=1e-6)
    still = plan("method=fedx", "local.lr=1e-30", "federation.clients=5", "participation.fraction=0.4")
    before, after = to_arrays(build_model(still.job, (3, 8, 8))), final_arrays(execute(still))
    parameters = [key for key, value in tensors(build_model(still.job, (3, 8, 8))) if value.requires_grad]
    for key in set(parameters) & set(after):
        np.testing.assert_allclose(after[key], before[key], rtol=0, atol=1e-25, err_msg=key)


# FedCA -------------------------------------------------------------------------------------------------------------


def test_fedca_is_simclr_with_the_dictionary_among_the_negatives() -> None:
    job = job_of("fedca", "method.norm=none", "method.dictionary=2")
    model, batch = model_of(job).double(), batch_of(job, 4)
    batch = Batch([view.double() for view in batch.views], batch.index)
    z = [model["projector"](model["encoder"](view)).detach() for view in batch.views]
    assert job.method.loss(model, batch, STEP).loss.item() == pytest.approx(slow_nt_xent(z[0], z[1], 0.5, []))
    others = vectors(3, 2, 8)
    others[1] = 0
    model["dictionary"].rows.copy_(others)
    want = slow_nt_xent(z[0], z[1], 0.5, [*others[0], *others[2]])
    assert job.method.loss(model, batch, STEP).loss.item() == pytest.approx(want)


def test_22_rows_of_others_are_no_positives() -> None:
    """A baseline's code pulled local example i to row i of other clients. Here every row repels every example."""
    z1, z2, others = vectors(3, 4), vectors(3, 4, seed=1), vectors(3, 4, seed=2)
    loss = nt_xent(z1, z2, others, temperature=0.1)
    torch.testing.assert_close(loss, nt_xent(z1, z2, others[[2, 0, 1]], temperature=0.1))
    for i in range(3):
        nearer = others.clone()
        nearer[i] = z1[i]
        assert (nt_xent(z1, z2, nearer, temperature=0.1)[i] > loss[i]).all(), "its own row i as well"


def test_the_dictionary_by_hand() -> None:
    rule = FedCA(momentum=0.5)
    now: Arrays = {
        "encoder.w": np.zeros(2, np.float32),
        "projections.rows": np.zeros((2, 2), np.float32),
        "dictionary.rows": np.array([[[1, 0], [0, 0]], [[0, 1], [1, 0]], [[0, 1], [0, 1]]], np.float32),
    }

    def update(rows: list[list[float]], weight: float, who: int) -> Update:
        sent = {"encoder.w": np.full(2, float(who), np.float32), "projections.rows": np.array(rows, np.float32)}
        return Update(sent, weight, who, {})

    merged = rule.merge(now, [update([[0, 1], [1, 0]], 3, 0), update([[0, 1], [0, 0]], 1, 2)])
    half = 1 / math.sqrt(2)
    want = [[[half, half], [1, 0]], [[0, 1], [1, 0]], [[0, 1], [0, 1]]]  # mixed, first seen; absent; alike, kept
    np.testing.assert_allclose(merged["dictionary.rows"], want, rtol=1e-6)
    assert not merged["projections.rows"].any()
    np.testing.assert_allclose(merged["encoder.w"], 0.5)
    start, _ = rule.receive(merged, Own(client=1), 2, Layout(frozenset(), frozenset(), {}))
    assert not start["dictionary.rows"][1].any()
    assert_same({"": start["dictionary.rows"][[0, 2]]}, {"": merged["dictionary.rows"][[0, 2]]})
    assert np.array(merged["dictionary.rows"][1]).any(), "the server's own stays whole"
    assert rules.refreshed_rows(np.zeros((1, 2)), np.zeros((1, 2)), 0.5).tolist() == [[0, 0]]


def test_what_a_client_sends_has_a_fixed_size() -> None:
    job = job_of("fedca", "method.dictionary=6")
    for n in (3, 6, 40):
        model = model_of(job, n)
        fit_one(job, model, n=n)
        rows = model["projections"].rows
        assert rows.shape == (6, 8)
        torch.testing.assert_close(rows.norm(dim=1)[: min(n, 6)], torch.ones(min(n, 6)))
        assert not rows[n:].any()
    assert spread(40, 6).tolist() == [0, 6, 13, 20, 26, 33]
    assert spread(3, 6).tolist() == [0, 1, 2]
    assert spread(4, None).tolist() == [0, 1, 2, 3]


def test_embeddings_leave_a_client_by_consent_alone(plan: Compose) -> None:
    refused = plan("method=fedca", "strategy=fedca", "payload.allow=[]")
    with pytest.raises(PrivacyError, match=r"'projections' holds embeddings .* payload.allow=\[projections\]"):
        execute(refused)
    with pytest.raises(PrivacyError):
        execute(plan("method=moco", "strategy.share.queue=merge", name="queue"))


def test_own_rows_are_dropped_and_others_are_not_sent_back(plan: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[tuple[int, int], np.ndarray] = {}
    genuine = client.fit

    def watching(method: Any, model: Any, *rest: Any, **named: Any) -> Any:
        seen[named["round"], named["client"]] = model["dictionary"].rows.clone().numpy()
        return genuine(method, model, *rest, **named)

    monkeypatch.setattr("fedssl.flower.client_app.fit", watching)
    run = execute(plan(*FEDCA, "federation.rounds=2"))
    for who in range(3):
        assert not seen[1, who].any()
        assert [bool(block.any()) for block in seen[2, who]] == [other != who for other in range(3)]
    after = final_arrays(run)
    assert not after["projections.rows"].any()
    weights = sum(v.nbytes for k, v in after.items() if part_of(k) in ("encoder", "projector"))
    assert {row["bytes_up"] for row in run.rows("clients.jsonl")} == {weights + 5 * 8 * 4}
    assert run.rows()[0]["bytes_down"] == 3 * (weights + (1 + 3) * 5 * 8 * 4)


def test_an_alignment_reads_the_servers_base_model(plan: Compose) -> None:
    run = execute(plan(*FEDCA_WIDE))
    target = final_arrays(run)["target.rows"]
    assert target.shape == (60, 8)
    assert target.any()
    assert all(row["misalignment"] > 0 for row in run.rows("clients.jsonl"))
    job = config.compose(tiny(*FEDCA_WIDE, "method.norm=none")).job
    model, batch = model_of(job), batch_of(job, 4)
    plain = job.method.loss(model, batch, STEP).loss
    public = public_of(job, torch.device("cpu"))
    assert public is not None
    rows = torch.tensor([4, 1])
    beside = Batch(batch.views, batch.index, job.data.augment.plain(public.batch(rows)), rows)
    assert torch.equal(job.method.loss(model, beside, STEP).loss, plain), "nothing to align with yet"
    model["target"].rows.copy_(torch.from_numpy(target))
    z = model["projector"](model["encoder"](beside.public)).detach()
    apart = sum(float((z[i] - model["target"].rows[row]).square().sum()) for i, row in enumerate((4, 1))) / 2
    assert job.method.loss(model, beside, STEP).loss.item() == pytest.approx(plain.item() + 0.01 * apart, rel=1e-5)


# FLESD -------------------------------------------------------------------------------------------------------------


def test_an_ensemble_by_hand() -> None:
    """Two teachers of three examples: cosines 0, 0.6, 0.8 of one, 1, 0, 0 of the other; T = 0.5."""
    first = np.array([[1, 0], [0, 2], [0.6, 0.8]])
    second = np.array([[1, 0, 0], [3, 0, 0], [0, 0, 1]])
    own, e = 1.0, lambda cosine: math.exp((cosine - 1) / 0.5)
    mean = [
        [own, (e(0) + e(1)) / 2, (e(0.6) + e(0)) / 2],
        [(e(0) + e(1)) / 2, own, (e(0.8) + e(0)) / 2],
        [(e(0.6) + e(0)) / 2, (e(0.8) + e(0)) / 2, own],
    ]
    want = torch.tensor([[value / sum(row) for value in row] for row in mean], dtype=torch.float64)
    torch.testing.assert_close(ensemble([first, second], 0.5), want)
    kept = ensemble([first], 0.5, top=1 / 3)  # an example itself and its nearest; the rest counts as cosine 0
    rows = [[own, e(0), e(0.6)], [e(0), own, e(0.8)], [e(0), e(0.8), own]]
    torch.testing.assert_close(kept, torch.tensor([[v / sum(r) for v in r] for r in rows], dtype=torch.float64))
    turn, _ = torch.linalg.qr(vectors(2, 2))
    torch.testing.assert_close(ensemble([first @ turn.numpy(), second], 0.5), want)


def test_a_student_learns_how_examples_lie_to_one_another() -> None:
    job = job_of("flesd", "encoder.norm=batch")
    workshop = workshop_of(job, torch.device("cpu"), (3, 8, 8))
    teacher = np.eye(3)[np.arange(60) % 3] + 0.01 * vectors(60, 3).numpy()  # three clusters that no pixel knows of
    target, lesson = ensemble([teacher], 0.1), Lesson(0.1, epochs=15, batch_size=16, lr=0.003, momentum=0.9)

    def gap(rows: np.ndarray) -> float:
        return float(-(target * torch.log(ensemble([rows], 0.1))).sum(1).mean())

    start = workshop.student()
    _, rows = teach(workshop, start, target, Lesson(0.1, 1, 16, 1e-9, 0.9), at=1)
    learnt, better = teach(workshop, start, target, lesson, at=1)
    assert gap(better) < gap(rows) - 0.5
    assert {part_of(key) for key in learnt} == {"encoder", "projector"}
    np.testing.assert_allclose(np.linalg.norm(better, axis=1), 1, rtol=1e-5)
    assert_same(learnt, teach(workshop, start, target, lesson, at=1)[0])
    other, _ = teach(workshop, start, target, lesson, at=2)
    assert (learnt["encoder.0.weight"] != other["encoder.0.weight"]).any(), "each round draws its own batches"


def test_the_pull_is_a_divergence_of_relations() -> None:
    job = job_of("flesd", "method.base.norm=none", "method.pull=2.0", "method.temperature=0.3")
    model, batch = model_of(job), batch_of(job, 4)
    public, rows = public_of(job, torch.device("cpu")), torch.tensor([7, 2, 30])
    assert public is not None
    beside = Batch(batch.views, batch.index, job.data.augment.plain(public.batch(rows)), rows)
    plain = job.method.loss(model, batch, STEP).loss.item()
    assert job.method.loss(model, beside, STEP).loss.item() == plain, "the server has not spoken yet"
    model["public"].rows.copy_(vectors(60, 8).float())
    own = model["projector"](model["encoder"](beside.public)).detach().double()
    told = model["public"].rows[rows].double()
    theirs, mine = (slow_relations(z, z, 0.3) for z in (told, own))
    apart = sum(p * math.log(p / q) for i in range(3) for p, q in zip(theirs[i], mine[i], strict=True)) / 3
    out = job.method.loss(model, beside, STEP)
    assert out.loss.item() == pytest.approx(plain + 2 * apart, rel=1e-5)
    assert out.aux["disagreement"].item() == pytest.approx(apart, rel=1e-4)
    single = job_of("flesd", "method@method.base=simsiam", "method.base.norm=group")
    assert single.method.coupling == "none", "public examples couple nothing of a client's own"
    fit_one(single, model_of(single))


def test_19_public_examples_are_never_a_clients_own() -> None:
    """They were client 0's by default. Here there is no default, and the private data set is refused by name."""
    with pytest.raises(ConfigError, match="reads public examples and there are none: add data@public=NAME"):
        config.compose(["method=flesd", "strategy=flesd"])
    with pytest.raises(ConfigError, match="the clients' own examples"):
        config.compose(["method=flesd", "strategy=flesd", "data@public=digits"])


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (("method=fedca", "strategy=fedavg"), "strategy=fedca"),
        (("method=flesd", "strategy=fedavg", *PUBLIC), "strategy=flesd"),
        (("method=flesd", "strategy=fedadam", *PUBLIC), "strategy=flesd"),
        (("strategy=fedca",), "method=fedca"),
        (("method=byol", "strategy=flesd"), "method=flesd"),
        ((*FLESD_RUN, "encoder@encoders.a=gin"), "encoders.a reads graphs"),
        ((*FLESD_RUN, "encoders=[1]"), "give each a name"),
        (("method=fedx", "method.relational=-1"), "weights"),
        (("method=fedca", "method.dictionary=0"), "give 1 or more"),
        ((*FLESD_RUN, "method.public_batch=1"), "nothing to compare"),
        ((*FLESD_RUN, "strategy.top=0"), "a share"),
        ((*FEDCA, "strategy.momentum=1"), "in \\[0, 1\\)"),
    ],
)
def test_what_does_not_belong_together_is_refused(overrides: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as caught:
        config.compose(tiny(*overrides) if "method=" in str(overrides) else [*tiny(), *overrides])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (MIXED, "'encoder' has other arrays with encoders.a than with encoder, and FedAvg"),
        ((*MIXED, "strategy.share.encoder=local"), "'projector' has other arrays .* strategy.share.projector=local"),
        ((*MIXED_RUN, "strategy.broadcast=true"), "'encoder' has other arrays"),
        (("strategy=ldawa", "strategy.share.projector=received"), "'projector' is received and never sent back"),
    ],
)
def test_what_cannot_travel_is_refused_before_the_first_round(
    overrides: tuple[str, ...], sentence: str, plan: Compose
) -> None:
    made = plan(*overrides)
    with pytest.raises(ConfigError, match=sentence):
        execute(made)
    assert not made.open().rows()


def test_a_received_part_comes_and_is_not_sent_back(plan: Compose) -> None:
    run = execute(plan("strategy.share.projector=received"))
    before, after = to_arrays(build_model(plan().job, (3, 8, 8))), final_arrays(run)
    assert_same(
        {k: v for k, v in after.items() if part_of(k) == "projector"},
        {k: before[k] for k in after if part_of(k) == "projector"},
    )
    sent = sum(v.nbytes for k, v in after.items() if part_of(k) == "encoder")
    assert {row["bytes_up"] for row in run.rows("clients.jsonl")} == {sent}
    assert run.rows()[0]["bytes_down"] > 3 * sent
    assert Share.received.comes
    assert not Share.derived.comes
    assert not Part("a", share=Share.received).teaches


# Whole runs --------------------------------------------------------------------------------------------------------


def test_clients_of_two_architectures_teach_one_student(plan: Compose) -> None:
    made = plan(*MIXED_RUN, "evaluate.every=1", "federation.clients=4", "evaluate.final=true", "evaluate.repeats=1")
    run = execute(made)
    after, rows = final_arrays(run), run.rows()
    assert set(after) == {"public.rows"}, "nothing else travels"
    assert {row["bytes_up"] for row in run.rows("clients.jsonl")} == {60 * 8 * 4}
    assert all(row["disagreement"] >= 0 for row in run.rows("clients.jsonl"))
    assert all({"client_knn_accuracy", "client_cka", "knn_accuracy"} <= row.keys() for row in rows)
    exported = load_encoder(run.path)
    assert exported.dim == 8
    student = {f"encoder.{key}": value for key, value in to_arrays(exported.network).items()}
    point = run.latest()
    assert point is not None
    learnt = {key.removeprefix("learnt/"): value for key, value in point.strategy[0].items()}
    assert_same(student, {key: value for key, value in learnt.items() if part_of(key) == "encoder"})
    untaught = to_arrays(build_model(made.job, (3, 8, 8)))
    assert any((student[key] != untaught[key]).any() for key in student)
    widths = {made.job.encoder_of(c).make((3, 8, 8))[1] for c in range(4)}
    assert widths == {12, 32}
    assert made.job.encoder_of(None) == made.job.encoder


def test_a_broadcast_starts_clients_from_the_student(plan: Compose) -> None:
    run = execute(plan(*FLESD_RUN, "strategy.broadcast=true"))
    after, point = final_arrays(run), run.latest()
    assert point is not None
    assert {part_of(key) for key in after} == {"encoder", "projector", "public"}
    for key, value in after.items():
        if part_of(key) != "public":
            assert_same({"": value}, {"": point.strategy[0][f"learnt/{key}"]})
    assert {row["bytes_up"] for row in run.rows("clients.jsonl")} == {60 * 8 * 4}


@pytest.mark.parametrize(
    "overrides",
    [
        ("method=fedx", "method@method.base=byol", "participation.fraction=0.67"),
        (*FEDCA, "participation.fraction=0.67"),
        FEDCA_WIDE,
        MIXED_RUN,
    ],
    ids=["fedx", "fedca", "fedca-aligned", "flesd-mixed"],
)
def test_four_rounds_are_two_and_a_kill_and_two(
    overrides: tuple[str, ...], plan: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("federation.rounds=4", "evaluate.every=2", *overrides)
    straight = execute(plan(*options, name="straight"))
    interrupted(plan(*options, name="broken"), 2, monkeypatch)
    resumed = execute(plan(*options, name="broken"))
    assert_same(final_arrays(straight), final_arrays(resumed))
    assert metrics(straight) == metrics(resumed)
    assert_same(*({k: v for k, v in to_arrays(load_encoder(run.path).network).items()} for run in (straight, resumed)))


@pytest.mark.parametrize("overrides", [FEDCA, MIXED_RUN], ids=["fedca", "flesd-mixed"])
def test_the_number_of_workers_does_not_matter(overrides: tuple[str, ...], plan: Compose) -> None:
    runs = [execute(plan(*overrides, f"engine.workers={w}", name=f"w{w}")) for w in (1, 3)]
    assert_same(*(final_arrays(run) for run in runs))


def test_a_strategy_that_trains_says_so_outside_a_run() -> None:
    with pytest.raises(ConfigError, match="only fedssl's own round loop"):
        FLESD().merge({"public.rows": np.zeros((2, 2))}, [Update({"public.rows": np.ones((2, 2))}, 1, 0, {})])


def test_an_encoder_of_a_client_is_named_in_the_command(tmp_path: Path) -> None:
    assert config.relax(["encoder@encoders.a=conv4", "method=flesd"]) == ["+encoder@encoders.a=conv4", "method=flesd"]
