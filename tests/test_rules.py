"""Every rule against numbers computed by hand from the papers, and the defects of the field's codes by name."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from conftest import assert_same, execute, final_arrays
from hypothesis import given
from hypothesis import strategies as st

from fedssl.config import Plan
from fedssl.errors import ConfigError, ProtocolError
from fedssl.flower import state_files
from fedssl.flower.rule import Own
from fedssl.parts import Arrays, Layout, Part
from strategies import rules
from strategies.base import Update
from strategies.fedavg import FedAvg
from strategies.fedema import FedEMA
from strategies.fedu import FedU
from strategies.fedvssl import FedVSSL
from strategies.ldawa import LDawa
from strategies.policy import PartPolicy

Compose = Callable[..., Plan]
KERNEL, BIAS, MEAN = "encoder.conv.weight", "encoder.conv.bias", "encoder.norm.running_mean"
LAYOUT = Layout(
    parameters=frozenset({KERNEL, BIAS, "predictor.w"}),
    kernels=frozenset({KERNEL}),
    follows={"teacher": ("encoder",)},
)
BYOL = (Part("encoder"), Part("predictor"), Part("teacher", trainable=False, follows=("encoder",)))


def model(kernel: list[float], bias: float = 0.0, mean: float = 0.0, predictor: float = 0.0) -> Arrays:
    """An encoder of one kernel, a bias and a running mean, and a predictor."""
    values = {KERNEL: kernel, BIAS: [bias], MEAN: [mean], "predictor.w": [predictor]}
    return {key: np.array(value, dtype=np.float32) for key, value in values.items()}


def updates(*each: tuple[Arrays, float, float]) -> list[Update]:
    """Arrays, weight and loss of each client."""
    return [Update(arrays, weight, i, {"loss": loss}) for i, (arrays, weight, loss) in enumerate(each)]


def at_round(strategy: LDawa, at: int) -> LDawa:
    strategy._at = at
    return strategy


# FedEMA ------------------------------------------------------------------------------------------------------------


def test_fedema_by_hand() -> None:
    """tau = .7, first distance 5, then distance sqrt 2: lambda = .14, mu = .1979899."""
    rule, mine = FedEMA(), model([3.0, 4.0], predictor=1.0)
    start, memo = rule.receive(model([0.0, 0.0]), Own(mine, {}, 1), 2, LAYOUT)
    assert memo["scale"] == pytest.approx(0.14)
    np.testing.assert_allclose(start[KERNEL], [2.1, 2.8], rtol=1e-6)
    np.testing.assert_allclose(start["predictor.w"], [0.7], rtol=1e-6, err_msg="the predictor has the same mu")
    now, mine = model([1.0, 1.0]), model([0.0, 0.0])
    start, memo = rule.receive(now, Own(mine, memo, 2), 3, LAYOUT)
    np.testing.assert_allclose(start[KERNEL], [0.8020101, 0.8020101], rtol=1e-6)
    assert memo["scale"] == pytest.approx(0.14), "lambda is set once"


def test_fedema_is_capped_so_that_the_blend_stays_convex() -> None:
    own = Own(model([0.0, 0.0]), {"scale": 1.0}, 1)
    assert_same(FedEMA().receive(model([30.0, 40.0]), own, 2, LAYOUT)[0], {**model([30.0, 40.0]), **own.arrays})
    start, _ = FedEMA(cap=0.7).receive(model([30.0, 40.0]), own, 2, LAYOUT)
    np.testing.assert_allclose(start[KERNEL], [9.0, 12.0], rtol=1e-6)
    start, _ = FedEMA(scale=0.01).receive(model([30.0, 40.0]), own, 2, LAYOUT)
    np.testing.assert_allclose(start[KERNEL], [15.0, 20.0], rtol=1e-6, err_msg="a fixed lambda wins over the memo")


def test_fedema_where_nothing_has_moved_takes_the_server() -> None:
    start, memo = FedEMA().receive(model([1.0, 2.0]), Own(model([1.0, 2.0]), {}, 1), 2, LAYOUT)
    assert_same(start, model([1.0, 2.0]))
    assert "scale" not in memo, "there is nothing to scale by yet"


def test_fedema_reference_measures_its_own_training_and_blends_parameters_only() -> None:
    rule = FedEMA(variant="reference")
    memo = rule.remember(model([0.0, 0.0]), model([3.0, 4.0], bias=9.0), {}, LAYOUT)
    assert memo["drift"] == pytest.approx(5.0), "kernels only"
    mine, now = model([3.0, 4.0], mean=8.0), model([1.0, 1.0], mean=2.0)
    start, memo = rule.receive(now, Own(mine, memo, 1), 2, LAYOUT)
    np.testing.assert_allclose(start[KERNEL], 0.7 * mine[KERNEL] + 0.3 * now[KERNEL], rtol=1e-6)
    assert start[MEAN] == 2.0, "running statistics are the server's"
    memo = rule.remember(start, {**start, KERNEL: start[KERNEL] + np.float32(0.6 / math.sqrt(2))}, memo, LAYOUT)
    shrunk, _ = rule.receive(now, Own(start, memo, 2), 3, LAYOUT)
    mu = 0.7 / 5.0 * 0.6
    np.testing.assert_allclose(shrunk[KERNEL], mu * start[KERNEL] + (1 - mu) * now[KERNEL], rtol=1e-5)


def test_fedema_selective_refreshes_everything_of_a_client_that_sat_out() -> None:
    rule, now, mine = FedEMA(selective=True), model([1.0, 1.0]), model([0.0, 0.0])
    there, _ = rule.receive(now, Own(mine, {"scale": 0.1}, 4), 5, LAYOUT)
    assert there[KERNEL][0] < 1
    gone, memo = rule.receive(now, Own(mine, {"scale": 0.1}, 3), 5, LAYOUT)
    assert_same({key: gone[key] for key in now}, now)
    assert_same({KERNEL: gone[f"teacher.{KERNEL}"]}, {KERNEL: now[KERNEL]})
    assert memo["scale"] == 0.1


def test_7_fedema_has_no_effect(plan: Compose) -> None:
    """A code assigned the blend into a copy. Here the blended start changes what the clients send."""
    options = ("method=byol", "federation.rounds=3", "strategy.share={teacher: local}")
    ema, avg = (execute(plan(f"strategy={s}", *options, name=s)) for s in ("fedema", "fedavg"))
    assert any((final_arrays(ema)[key] != value).any() for key, value in final_arrays(avg).items())


@given(st.floats(0, 50), st.floats(0, 50))
def test_8_fedema_is_inverted(near: float, far: float) -> None:
    """A code kept less of a client the farther it was. Here it keeps at least as much."""
    near, far = sorted((near, far))
    assert rules.fedema_share(near, 0.14, 1.0) <= rules.fedema_share(far, 0.14, 1.0) <= 1.0


def test_16_a_late_joiner_never_gets_its_lambda(plan: Compose) -> None:
    """A code computed lambda in the first three rounds only. Here each client does at its own second round."""
    run = execute(plan("method=byol", "strategy=fedema", "federation.rounds=6", "participation.fraction=0.67"))
    trained: dict[int, int] = {}
    for row in run.rows("clients.jsonl"):
        trained[row["client"]] = trained.get(row["client"], 0) + 1
    assert max(trained.values()) > 1
    for client, rounds in trained.items():
        path = state_files.newest(run.clients, client, 99)
        assert path is not None
        assert (state_files.read(path).memo.get("scale", 0) > 0) == (rounds > 1)


# FedU --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("moved", "kept"), [(0.6, False), (0.7, True)])
def test_fedu_by_hand(moved: float, kept: bool) -> None:
    """Squared distance .36 is below .4, .49 is not."""
    rule, start = FedU(), model([0.0, 0.0])
    trained = model([moved, 0.0], predictor=7.0, mean=100.0)
    memo = rule.remember(start, trained, {}, LAYOUT)
    assert memo["divergence"] == pytest.approx(moved**2), "parameters only, and squared"
    own = Own({"predictor.w": trained["predictor.w"]}, memo, 1)
    received, _ = rule.receive(model([5.0, 5.0], predictor=-1.0), own, 2, LAYOUT)
    assert received["predictor.w"] == (7.0 if kept else -1.0)
    np.testing.assert_array_equal(received[KERNEL], [5.0, 5.0], err_msg="the encoder is the server's in any case")


def test_fedu_reference_is_a_mean_of_distances_over_kernels() -> None:
    memo = FedU(variant="reference").remember(model([0.0, 0.0]), model([0.3, 0.4], bias=5.0), {}, LAYOUT)
    assert memo["divergence"] == pytest.approx(0.5)


def test_fedu_keeps_teacher_and_predictor_apart() -> None:
    assert FedU().shares(BYOL) == {"teacher": "local"}
    assert FedU().shares(BYOL[:2]) == {}, "a method without a teacher"
    assert list(FedU().keeps) == ["predictor"]


# L-DAWA ------------------------------------------------------------------------------------------------------------


def test_ldawa_by_hand() -> None:
    """One client (4, 3) and the server's (3, 4): cosine .96, so (3.84, 2.88); a convex mean would give (4, 3)."""
    now, one = ({"encoder.w": np.array(v, dtype=np.float32)} for v in ([3, 4], [4, 3]))
    merged = at_round(LDawa(), 4).merge(now, updates((one, 10, 0)))
    np.testing.assert_allclose(merged["encoder.w"], [3.84, 2.88], rtol=1e-6)
    early = at_round(LDawa(), 3).merge(now, updates((one, 10, 0)))
    np.testing.assert_allclose(early["encoder.w"], [4, 3], rtol=1e-6, err_msg="FedAvg in the first three rounds")
    guarded = at_round(LDawa(normalise=True), 4).merge(now, updates((one, 10, 0)))
    np.testing.assert_allclose(guarded["encoder.w"], [4, 3], rtol=1e-6)


def test_ldawa_weighs_each_array_by_itself() -> None:
    now = {"encoder.a": np.array([1.0, 0.0], np.float32), "encoder.b": np.array([0.0, 2.0], np.float32)}
    one = {"encoder.a": np.array([2.0, 0.0], np.float32), "encoder.b": np.array([1.0, 0.0], np.float32)}
    two = {"encoder.a": np.array([0.0, 3.0], np.float32), "encoder.b": np.array([0.0, 5.0], np.float32)}
    merged = at_round(LDawa(), 9).merge(now, updates((one, 1, 0), (two, 3, 0)))
    np.testing.assert_allclose(merged["encoder.a"], [1.0, 0.0], atol=1e-7)  # (1 * one + 0 * two) / 2
    np.testing.assert_allclose(merged["encoder.b"], [0.0, 2.5], atol=1e-7)
    mixed = at_round(LDawa(weighting="examples"), 9).merge(now, updates((one, 1, 0), (two, 3, 0)))
    np.testing.assert_allclose(mixed["encoder.b"], [0.0, 3.75], atol=1e-7)
    convex = at_round(LDawa(normalise=True), 9).merge(now, updates((one, 1, 0), (two, 3, 0)))
    np.testing.assert_allclose(convex["encoder.a"], [2.0, 0.0], atol=1e-7)


@given(st.lists(st.lists(st.floats(-5, 5, width=32), min_size=3, max_size=3), min_size=1, max_size=4))
def test_ldawa_never_grows_and_its_guard_never_leaves_the_clients(each: list[list[float]]) -> None:
    now = {"encoder.w": np.array([1.0, 2.0, 3.0], np.float32)}
    arrays = [{"encoder.w": np.array(values, np.float32)} for values in each]
    raw = rules.layerwise(now, arrays, [1.0] * len(arrays), False)["encoder.w"]
    mean = np.mean([np.linalg.norm(values) for values in each])
    assert np.linalg.norm(raw) <= mean * (1 + 1e-5) + 1e-6


def test_ldawa_says_when_there_is_nothing_to_normalise_by() -> None:
    now, one = ({"encoder.w": np.array(v, dtype=np.float32)} for v in ([1, 0], [0, 1]))
    with pytest.raises(ProtocolError, match="orthogonal"):
        at_round(LDawa(normalise=True), 9).merge(now, updates((one, 1, 0)))


def test_ldawa_of_arrays_of_zeros_keeps_them() -> None:
    now = {"encoder.w": np.zeros(2, np.float32), "encoder.n": np.array(3)}
    one = {"encoder.w": np.array([1.0, 2.0], np.float32), "encoder.n": np.array(5)}
    merged = at_round(LDawa(), 9).merge(now, updates((one, 1, 0)))
    np.testing.assert_allclose(merged["encoder.w"], [1.0, 2.0], err_msg="a fresh bias has no direction to differ from")
    assert merged["encoder.n"] == 5


# FedVSSL -----------------------------------------------------------------------------------------------------------


def test_fedvssl_by_hand() -> None:
    one, two, now = (model([v, 0.0]) for v in (1.0, 5.0, 0.0))
    clients = updates((one, 1, 0.0), (two, 3, math.log(3)))  # loss weights 3/4 and 1/4, sizes 1/4 and 3/4
    by_loss, by_size = 0.75 * 1 + 0.25 * 5, 0.25 * 1 + 0.75 * 5
    for alpha in (0.0, 0.9, 1.0):
        merged = FedVSSL(alpha=alpha, beta=False).merge(now, clients)
        np.testing.assert_allclose(merged[KERNEL][0], alpha * by_loss + (1 - alpha) * by_size, rtol=1e-6)
    merged = FedVSSL(alpha=1.0, beta=True).merge(now, clients)
    np.testing.assert_allclose(merged[KERNEL][0], by_loss / 2, rtol=1e-6, err_msg="averaged with the round before")


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9, 1.0])
def test_3_fedvssl_shrinks_equal_clients(alpha: float) -> None:
    """A code joined lists where it meant to add, and 20 rounds left a third of the weights. Here nothing moves."""
    start = now = model([1.0, -2.0], bias=0.3, mean=4.0, predictor=1e-3)
    for _ in range(20):
        now = FedVSSL(alpha=alpha).merge(now, updates((now, 5, 1.0), (now, 77, 2.0), (now, 1, 0.1)))
    for key, value in now.items():
        np.testing.assert_allclose(value, start[key], rtol=1e-5)


def test_fedvssl_survives_losses_of_any_size_and_wants_one() -> None:
    assert rules.loss_weights([1e6, 1e6 + math.log(3)]) == pytest.approx([0.75, 0.25])
    assert rules.loss_weights([-1e4, 0.0]) == pytest.approx([1.0, 0.0])
    with pytest.raises(ProtocolError, match="client 7 did not report its loss"):
        FedVSSL().merge(model([0.0, 0.0]), [Update(model([0.0, 0.0]), 1.0, 7, {})])


def test_fedvssl_sends_the_backbone_only(plan: Compose) -> None:
    run = execute(plan("method=byol", "strategy=fedvssl"))
    assert {key.partition(".")[0] for key in final_arrays(run)} == {"encoder"}


# Policies of parts -------------------------------------------------------------------------------------------------


def policy(**parts: dict[str, object]) -> PartPolicy:
    return PartPolicy(parts=parts)


def test_a_part_is_overwritten_kept_blended_or_gated() -> None:
    now, mine = model([1.0, 1.0], predictor=10.0), model([5.0, 5.0], predictor=20.0)

    def received(memo: dict[str, float], **options: object) -> float:
        rule = policy(predictor=options)
        own = Own({"predictor.w": mine["predictor.w"]} if "predictor" in rule.keeps else {}, memo, 1)
        return float(rule.receive(now, own, 2, LAYOUT)[0]["predictor.w"][0])

    assert received({}, receive="overwrite") == 10.0
    assert received({}, receive="keep") == 20.0
    assert received({}, receive="ema", mu=0.25) == 12.5
    assert received({"moved": 0.3}, receive="gate", threshold=0.4) == 10.0
    assert received({"moved": 0.4}, receive="gate", threshold=0.4) == 20.0
    memo = policy(predictor={"receive": "gate"}).remember(model([0.0, 0.0]), model([3.0, 4.0], mean=9.0), {}, LAYOUT)
    assert memo == {"moved": 25.0}


def test_a_part_has_its_own_weights() -> None:
    rule = policy(predictor={"weight": "uniform"})
    one, two = (Update(model([0.0, 0.0]), w, i, {}) for i, w in enumerate((1.0, 9.0)))
    assert [rule.weigh(u, "encoder") for u in (one, two)] == [1.0, 9.0]
    assert [rule.weigh(u, "predictor") for u in (one, two)] == [1.0, 1.0]


def test_a_teacher_can_stand_in_for_the_online_network() -> None:
    rule = policy(encoder={"merges": "teacher"}, teacher={"receive": "keep"})
    assert rule.shares(BYOL) == {"teacher": "merge"}
    mean = {**model([1.0, 1.0]), f"teacher.{KERNEL}": np.array([7.0, 8.0], np.float32)}
    mean |= {f"teacher.{key}": mean[key] for key in (BIAS, MEAN)}
    merged = rule.merge(mean, [Update(mean, 1.0, None, {})])
    np.testing.assert_array_equal(merged[KERNEL], [7.0, 8.0])
    np.testing.assert_array_equal(merged["predictor.w"], mean["predictor.w"])


def test_the_server_can_refresh_a_teacher_alone() -> None:
    """FedBYOL's `online -> target`: the client keeps its online network, its teacher becomes the server's."""
    rule = policy(encoder={"receive": "keep"}, teacher={"receive": "overwrite"})
    now, mine = model([1.0, 1.0]), model([5.0, 5.0])
    start, _ = rule.receive(now, Own({k: v for k, v in mine.items() if k.startswith("encoder")}, {}, 1), 2, LAYOUT)
    np.testing.assert_array_equal(start[KERNEL], [5.0, 5.0])
    np.testing.assert_array_equal(start[f"teacher.{KERNEL}"], [1.0, 1.0])


def test_fedbyol_update_both_is_fedavg_with_a_derived_teacher(plan: Compose) -> None:
    """Two ways to say one thing give the same bits."""
    both, avg = (
        execute(plan("method=byol", f"strategy={name}", "federation.rounds=3", name=name))
        for name in ("fedbyol_online_both", "fedavg")
    )
    assert_same(final_arrays(both), final_arrays(avg))


def test_fedema_without_blending_is_fedbyol(plan: Compose) -> None:
    ema, byol = (
        execute(plan("method=byol", *options, "federation.rounds=3", name=options[0].partition("=")[2]))
        for options in (("strategy=fedema", "strategy.scale=0"), ("strategy=fedbyol",))
    )
    assert_same(final_arrays(ema), final_arrays(byol))


def test_5_the_memory_bank_and_target_nets_are_uploaded(plan: Compose) -> None:
    """A code sent single examples' embeddings and the target network. Here neither leaves unless asked, or at all."""
    for strategy in ("fedavg", "fedu", "fedema", "fedbyol", "ldawa"):
        run = execute(plan("method=moco", f"strategy={strategy}", name=strategy))
        assert {key.partition(".")[0] for key in final_arrays(run)} == {"encoder", "projector"}


# FedProx -----------------------------------------------------------------------------------------------------------


def test_fedprox_pulls_clients_to_where_they_started(plan: Compose) -> None:
    drifts = []
    for proximal in (0.0, 50.0):
        options = (
            "strategy=fedprox",
            f"strategy.proximal={proximal}",
            "local.epochs=6",
            "local.optimizer=sgd",
            "method.norm=none",
        )
        drifts.append(execute(plan(*options, "local.lr=0.01", name=f"p{proximal}")).rows()[-1]["drift"])
    assert drifts[1] < 0.5 * drifts[0]


def test_fedprox_of_strength_zero_is_fedavg(plan: Compose) -> None:
    zero, avg = execute(plan("strategy=fedprox", "strategy.proximal=0", name="z")), execute(plan(name="a"))
    assert_same(final_arrays(zero), final_arrays(avg))


# Weights -----------------------------------------------------------------------------------------------------------


def test_9_weights_of_those_who_came_sum_to_one_and_belong_to_them() -> None:
    """A code divided by everybody's examples and read the size of another client. Here the mean is of who came."""
    now, strategy = model([0.0, 0.0]), FedAvg()
    for update in updates((model([1.0, 0.0]), 30, 0), (model([4.0, 0.0]), 10, 0)):
        assert strategy.weigh(update, "encoder") == update.weight
    merged = rules.weighted_mean([model([1.0, 0.0]), model([4.0, 0.0])], [30, 10])
    np.testing.assert_allclose(merged[KERNEL], [1.75, 0.0])
    assert merged.keys() == now.keys()


def test_18_clients_are_weighed_by_batches() -> None:
    """Examples, as FedAvg says: 33 and 64 at batch size 32 are 2 batches each, but not alike."""
    merged = rules.weighted_mean([model([1.0, 0.0]), model([2.0, 0.0])], [33, 64])
    np.testing.assert_allclose(merged[KERNEL][0], (33 + 128) / 97, rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: FedEMA(cap=1.2), "leaves the line"),
        (lambda: FedEMA(tau=-1), "leaves the line"),
        (lambda: FedEMA(variant="easyfl"), "paper or reference"),
        (lambda: FedU(threshold=-1), "0 or more"),
        (lambda: FedU(variant="x"), "paper or reference"),
        (lambda: LDawa(weighting="loss"), "uniform or examples"),
        (lambda: LDawa(warmup=-1), "0 or more"),
        (lambda: FedVSSL(alpha=1.5), r"\[0, 1\]"),
        (lambda: FedAvg(proximal=-0.1), "push clients away"),
        (lambda: policy(encoder={"receive": "replace"}), "overwrite, keep, ema, gate"),
        (lambda: policy(encoder={"recieve": "keep"}), "did you mean receive"),
        (lambda: policy(encoder={"mu": 2.0}), "leaves the line"),
        (lambda: policy(encoder={"merges": "teacher"}).shares(BYOL[:2]), "no teacher of it"),
    ],
)
def test_wrong_options_are_refused(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()
