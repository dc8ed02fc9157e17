"""Who takes part, in whole runs: late, skipped, stale, dropped, partial, nobody; for every strategy alike."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import assert_same, execute, final_arrays, tiny
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from test_config import node
from test_laws import interrupted, metrics
from test_methods import METHODS, fit_one, job_of, model_of

from fedssl import config
from fedssl.client import FitResult, fit
from fedssl.config import Plan
from fedssl.errors import FedsslError, ProtocolError
from fedssl.flower import codec, strategy_state, turns
from fedssl.flower.client_app import app
from fedssl.flower.in_process import InProcessGrid
from fedssl.flower.rule import Own, PartRule
from fedssl.flower.server import federate
from fedssl.gradient import PlainGradient
from fedssl.job import Job
from fedssl.job.setup import build_model, public_of, shares_of
from fedssl.model import Model, layout_of, to_arrays
from fedssl.participation.base import Turn
from fedssl.parts import Arrays, part_of
from fedssl.progress import Reporter
from fedssl.rundir import RunDirectory

Compose = Callable[..., Plan]

# (round, client, options): 3 joins late, 2 returns stale after three rounds, 1 and 4 drop out, nobody comes to round 3,
# 0 has time for half of its steps in round 4 and 3 for none in round 6.
SCRIPT: list[tuple[int, int, dict[str, Any]]] = [
    *[(1, client, {}) for client in (0, 1, 2, 4)],
    *[(2, client, {}) for client in (0, 1)],
    *[(4, 0, {"work": 0.5}), (4, 1, {"lost": "dropped"}), (4, 3, {})],
    *[(5, 0, {}), (5, 2, {"staleness": 3}), (5, 4, {"lost": "dropped"})],
    *[(6, 0, {}), (6, 1, {"staleness": 1}), (6, 2, {}), (6, 3, {"work": 0.0})],
]
LAST = {0: 6, 1: 6, 2: 6, 3: 4, 4: 1}  # the last round that each finished
CAME = {1: 4, 2: 2, 3: 0, 4: 2, 5: 2, 6: 3}
VARIANTS = [name for name in config.options_of("strategy") if name.startswith("fedbyol_")]  # one class, one resume


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """The options of a run in which everything happens."""
    path = tmp_path_factory.mktemp("script") / "turns.jsonl"
    path.write_text("".join(json.dumps({"round": r, "client": c, **more}) + "\n" for r, c, more in SCRIPT))
    return (
        *("participation=replay", f"participation.path={path}", "federation.rounds=6", "federation.clients=5"),
        *("partition.alpha=1000.0", "data.train=60"),
    )


def run_in(grid: InProcessGrid, plan: Plan) -> RunDirectory:
    rundir = plan.open()
    with grid:
        federate(grid, plan.job, rundir, Reporter(quiet=True))
    return rundir


@lru_cache
def composed(*overrides: str) -> dict[str, Any]:
    """A composed job; Hydra takes longer than a run here, so strategies are put into it afterwards."""
    return dict(config.compose(tiny(*overrides)).job.tree)


def with_strategy(strategy: str, *overrides: str, **federation: int) -> dict[str, Any]:
    """A job of a strategy, with the method that it serves: the one of its name, else BYOL, which has every part."""
    tree = composed(f"method={strategy if strategy in METHODS else 'byol'}", *overrides)
    chosen = node(f"strategy/{strategy}.yaml") | ({"steps": 5} if strategy == "orchestra" else {})  # of its clustering
    return {**tree, "strategy": chosen, "federation": {**tree["federation"], **federation}}


def place_of(folder: Path, name: str) -> dict[str, Any]:
    return {"engine": {"_target_": "fedssl.flower.engines.InProcess", "workers": 2}, "name": name, "out": str(folder)}


@pytest.mark.parametrize("strategy", config.options_of("strategy"))
def test_every_strategy_in_every_case(
    strategy: str, script: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Rows, models, the strategy's and the clients' states are as the script says; killed in the middle, it resumes."""
    quorum = 3 if strategy == "bulyan" else 1  # Bulyan needs 4 f + 3 clients, with f = 0 here
    chosen = Plan.of(with_strategy(strategy, *script, quorum=quorum) | place_of(tmp_path, "straight"))
    models: dict[int, Arrays] = {}
    states: list[tuple[Arrays, dict[str, Any]]] = []
    add, take = turns.History.add, strategy_state.take

    def watched(history: turns.History, at: int, arrays: Arrays, limit: int) -> None:
        models[at] = arrays
        add(history, at, arrays, limit)
        assert len(history.models) <= 4, "three earlier models for a staleness of 3"

    with monkeypatch.context() as patch:
        patch.setattr(turns.History, "add", watched)
        patch.setattr(strategy_state, "take", lambda strategy: states.append(take(strategy)) or states[-1])  # type: ignore[func-returns-value]
        rundir = run_in(grid := InProcessGrid(app, 5, 2), chosen)

    rows = {row["round"]: row for row in rundir.rows()}
    for at, row in rows.items():
        asked = sum(r == at for r, _, _ in SCRIPT) >= quorum
        assert row["clients"] == CAME[at] * asked
        skipped = row["clients"] < quorum
        assert row.get("skipped", False) == skipped
        assert ("loss" in row) == bool(row["clients"])
        if at > 1:
            same = all((models[at][key] == models[at - 1][key]).all() for key in models[at])
            assert same == skipped, "a skipped round leaves the model as it is, and only such a round does"
        if at > 1 and skipped:
            assert states[at - 1][1] == states[at - 2][1]
            assert_same(states[at - 1][0], states[at - 2][0])
    assert [rows[at].get("dropped", 0) for at in rows] == [0, 0, 0, 1, 1, 0]
    last = {client: codec.ClientState.load(grid.context(client + 1)).round for client in range(5)}
    assert last == LAST, "a client that dropped out has the state of before"
    if strategy not in VARIANTS:
        broken = chosen.at(tmp_path / "broken")
        assert not interrupted(broken, 4, monkeypatch).done
        resumed = execute(broken)
        assert_same(final_arrays(rundir), final_arrays(resumed))
        assert metrics(rundir) == metrics(resumed)


@pytest.mark.parametrize("strategy", config.options_of("strategy"))
def test_a_client_that_never_trained_begins_with_the_servers_model(strategy: str) -> None:
    """In whatever round it joins: no rule has anything else to give it."""
    job = Job(with_strategy(strategy))
    rule = job.strategy()
    if not isinstance(rule, PartRule):
        return  # Flower's own have no client side: everybody begins with the server's model
    model = build_model(job, (3, 8, 8))
    shares = shares_of(job, model)
    now = {key: value + 1 for key, value in to_arrays(model).items() if shares[key].comes}
    for at in (1, 9):
        start, _ = rule.receive(now, Own(), at, layout_of(model, job.method.parts))
        given = {key: start.get(key, value) for key, value in now.items() if part_of(key) not in job.method.summaries}
        assert_same(given, {key: now[key] for key in given})


@pytest.mark.parametrize("method", METHODS)
def test_partial_work_is_the_beginning_of_the_whole(method: str) -> None:
    """Three of four steps: the same batches, views and learning rates as the first three of a whole round."""
    job = job_of(method, "local.epochs=2")
    whole, part = model_of(job), model_of(job)
    seen: list[Arrays] = []
    after = type(job.method).after_step

    def spy(self: Any, model: Model, *rest: Any) -> None:
        after(self, model, *rest)
        seen.append(to_arrays(model))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(job.method), "after_step", spy)
        assert fit_one(job, whole).steps == 4
    result = fit_some(job, part, 0.75)
    assert (result.steps, result.work, result.examples) == (3, 0.75, 16)
    trained = {p.name for p in job.method.parts if p.trainable or p.follows}  # others may change before the upload
    own = {key: value for key, value in to_arrays(part).items() if part_of(key) in trained}
    assert_same(own, {key: seen[2][key] for key in own})
    assert np.isfinite(result.loss)


def fit_some(job: Any, model: Model, work: float) -> FitResult:
    shard = job.data.load().train.shard(np.arange(16), 0)
    fixed: dict[str, Any] = {
        "public": public_of(job, torch.device("cpu")),
        "gradient": PlainGradient(),
        "round": 1,
        "rounds": job.federation.rounds,
        "seed": job.seed,
        "client": 0,
    }
    return fit(job.method, model, shard, job.data.augment, job.local, work=work, **fixed)


@pytest.mark.parametrize(("work", "steps"), [(0.0, 0), (0.09, 0), (0.29, 2), (0.3, 3), (0.7, 7), (1.0, 10)])
def test_steps_are_rounded_down(work: float, steps: int) -> None:
    job = job_of("simclr", "local.epochs=5")
    model = model_of(job)
    before = to_arrays(model)
    result = fit_some(job, model, work)
    assert (result.steps, result.work) == (steps, steps / 10)
    if not steps:
        assert_same(before, to_arrays(model))


def echo() -> ClientApp:
    """Clients whose training adds (client + 1) to every number, and which tell what model they began with."""
    echoing = ClientApp()

    @echoing.train()
    def train(message: Message, context: Context) -> Message:
        client = int(context.node_config["partition-id"])
        told = message.content.config_records[codec.CONFIG]
        arrays = codec.decode(message.content.array_records[codec.ARRAYS])
        moved = {k: v + np.asarray(client + 1, v.dtype) for k, v in arrays.items()}
        numbers = {codec.WEIGHT: 2 * client + 1, "loss": 0.0, "drift": 0.0, "begun": int(told.get("begun", -1))}  # type: ignore[call-overload]
        return Message(codec.reply(moved, {**numbers, "seen": float(arrays[KEY].mean())}), reply_to=message)

    return echoing


KEY = "encoder.0.weight"


@pytest.mark.parametrize(("rate", "discount"), [(1.0, 0.5), (0.5, 0.0)])
def test_stale_updates_by_hand(rate: float, discount: float, script: tuple[str, ...], plan: Compose) -> None:
    """x_r = x_{r-1} + sum_k n_k rate (1 + s_k)^-discount d_k / sum_k n_k, each d_k made from the model of its start."""
    chosen = plan(*script, f"participation.rate={rate}", f"participation.discount={discount}")
    rundir = run_in(InProcessGrid(echo(), 5, 2), chosen)
    moved = {0: 0.0}  # the sum of all merges so far
    for at in range(1, 7):
        came = [(c, more.get("staleness", 0)) for r, c, more in SCRIPT if r == at and "lost" not in more]
        step = sum((2 * c + 1) * rate * (1 + s) ** -discount * (c + 1) for c, s in came)
        moved[at] = moved[at - 1] + (step / sum(2 * c + 1 for c, _ in came) if came else 0.0)
    initial = to_arrays(build_model(chosen.job, (3, 8, 8)))
    for key, value in final_arrays(rundir).items():
        if np.issubdtype(value.dtype, np.floating):
            np.testing.assert_allclose(value - initial[key], moved[6], rtol=1e-5, atol=1e-5, err_msg=key)
    rows = {(row["round"], row["client"]): row for row in rundir.rows("clients.jsonl")}
    for (at, _), row in rows.items():
        start = at - 1 - row["staleness"]
        assert row["begun"] in (start + 1, -1)  # -1: not told, so it begins and ends in the same round
        assert row["begun"] != -1 or not row["staleness"]
        assert row["seen"] == pytest.approx(float(initial[KEY].mean()) + moved[start], abs=1e-5)
    assert rundir.rows()[4]["staleness"] == 1.5


def test_rebase_keeps_bits_types_and_absence() -> None:
    start = {"a": np.float32([1, 2]), "n": np.array(3), "b": np.float32([7])}
    now = {"a": np.float32([5, 5]), "n": np.array(10), "b": np.float32([7])}
    moved = turns.rebase({"a": np.float32([1.5, 2]), "n": np.array(6)}, start, now, 0.5)
    assert_same(moved, {"a": np.float32([5.25, 5]), "n": np.array(12)})  # 10 + 1.5 to the even neighbour
    trained = {"a": np.float32([0.1, -0.3]), "n": np.array(4), "b": np.float32([1e-3])}
    assert_same(turns.rebase(trained, start, start, 1.0), trained)


def test_old_models_are_forgotten_and_merges_are_not() -> None:
    history = turns.History(merges=[1, 2, 5])
    for at in range(9):
        history.add(at, {}, 2)
    assert sorted(history.models) == [6, 7, 8]
    history.add(9, {}, 0)
    assert sorted(history.models) == [9]
    assert [history.made(at) for at in range(8)] == [0, 1, 2, 2, 2, 5, 5, 5]


def test_what_a_client_says_of_its_data_is_no_change_of_anything() -> None:
    """A stale client's weights are moved to the present model; its correlation matrix is what it is."""
    old, now, new = ({"encoder.w": np.float32([v]), "correlation.matrix": np.float32([v])} for v in (1, 5, 2))
    with InProcessGrid(app, 2):
        message = Message(codec.instruction(codec.encode(old), codec.ConfigRecord({})), 1, "train")
        reply = Message(codec.reply(new, {codec.WEIGHT: 1}), reply_to=message)
    history = turns.History({0: old, 3: now})
    stale = {reply.metadata.src_node_id: Turn(7, 0)}
    told: list[tuple[int, Arrays]] = []
    scale, tell = (lambda staleness: 0.5), (lambda client, arrays: told.append((client, arrays)))
    (moved,) = turns.catch_up([reply], stale, 4, history, scale, ("correlation",), tell)
    assert_same(codec.decode(moved.content.array_records[codec.ARRAYS]), {**new, "encoder.w": np.float32([5.5])})
    assert told[0][0] == 7
    assert told[0][1]["encoder.w"] == 5.5, "the monitor compares the merge with what was merged"


@pytest.mark.parametrize("strategy", ["fedema", "fedsc"])
def test_a_skipped_round_between_two_turns_is_not_an_absence(
    strategy: str, plan: Compose, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Two rounds with all, or a night between them: what clients are told of the last merge is that they were in it."""
    told: dict[str, set[bool]] = {}
    for name, rounds in (("day", (1, 2)), ("night", (1, 4))):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"round": r, "client": c}) + "\n" for r in rounds for c in range(3)))
        replay = ("participation=replay", f"participation.path={path}", f"federation.rounds={rounds[-1]}")
        tree = with_strategy(strategy, *replay)
        rule = type(Job(tree).strategy())

        def spy(*a: Any, seen: set[bool] = told.setdefault(name, set()), receive: Any = rule.receive) -> Any:  # noqa: B008
            seen.add(a[2].round == a[3] - 1)  # own and at
            return receive(*a)

        with monkeypatch.context() as patch:
            patch.setattr(rule, "receive", spy)
            execute(Plan.of(tree | place_of(tmp_path, name)))
    assert told == {"day": {True}, "night": {True}}


@pytest.mark.parametrize("overrides", [("strategy=fedema", "method=byol"), ("strategy=fedadam",)])
def test_buffered_clients_of_one_pace_are_a_synchronous_federation(overrides: tuple[str, ...], plan: Compose) -> None:
    """Bit for bit; a staleness of 0 everywhere is the special case."""
    buffered = ("participation=buffered", "participation.buffer=3", "participation.concurrency=3")
    pace = ("pace@participation.pace=listed", "participation.pace.times_s=[1.0]")
    ours = execute(plan(*overrides, *buffered, *pace, name="buffered"))
    theirs = execute(plan(*overrides, name="synchronous"))
    assert_same(final_arrays(ours), final_arrays(theirs))
    assert [row["staleness"] for row in ours.rows()] == [0, 0]


def test_a_run_can_be_replayed(plan: Compose) -> None:
    """With the clients.jsonl that it left: the same turns, so the same bits."""
    slow = ("participation=buffered", "participation.concurrency=3", "participation.buffer=2", "federation.rounds=5")
    paces = ("pace@participation.pace=listed", "participation.pace.times_s=[1.0, 1.7, 2.9]")
    first = execute(plan(*slow, *paces, name="first"))
    assert max(row["staleness"] for row in first.rows("clients.jsonl")) > 0
    again = plan("participation=replay", f"participation.path={first.path / 'clients.jsonl'}", "federation.rounds=5")
    assert_same(final_arrays(first), final_arrays(execute(again)))


def test_stale_updates_arrive_compressed(plan: Compose, script: tuple[str, ...]) -> None:
    """A coded change is one of the model that the turn began with, so coding in 16 bits changes next to nothing."""
    plain = execute(plan(*script, name="plain"))
    coded = execute(plan(*script, "compression.values=float16", "compression.down=float16", name="coded"))
    (x, y, initial) = (
        np.concatenate([a[key].ravel() for key in a if key.endswith("weight")])
        for a in (final_arrays(plain), final_arrays(coded), to_arrays(build_model(plan().job, (3, 8, 8))))
    )
    assert np.abs(x - y).mean() < 0.02 * np.abs(x - initial).mean()
    assert coded.rows()[0]["bytes_up"] < 0.7 * plain.rows()[0]["bytes_up"]
    per_client = [row["bytes_down"] / n for row, n in zip(coded.rows()[3:5], (3, 3), strict=True)]
    assert per_client[0] == per_client[1] == coded.rows()[0]["bytes_down"] / 4, "who drops out was sent the model, too"


def test_slow_clients_report_their_work(plan: Compose) -> None:
    options = ("participation=stragglers", "pace@participation.pace=listed", "local.epochs=2", "partition=iid")
    times = "participation.pace.times_s=[30.0, 120.0, 1000.0]"
    rundir = execute(plan(*options, times, "federation.rounds=1", "data.train=96"))
    rows = rundir.rows("clients.jsonl")
    assert [(row["steps"], row["work"]) for row in rows] == [(8, 1.0), (4, 0.5), (0, 0.0)]
    assert [("loss" in row, row["bytes_up"] > 0) for row in rows] == [(True, True), (True, True), (False, False)]
    (row,) = rundir.rows()
    assert (row["clients"], row["failures"], row["simulated_seconds"]) == (2, 0, 60.0)
    assert row["bytes_down"] == 3 * row["bytes_up"] / 2


def test_a_round_below_the_quorum(plan: Compose, script: tuple[str, ...]) -> None:
    skipping = execute(plan(*script, "federation.quorum=3", name="skip"))
    assert [row.get("skipped", False) for row in skipping.rows()] == [False, True, True, True, True, False]
    assert [row["clients"] for row in skipping.rows()] == [4, 0, 0, 2, 2, 3], "two of three came: they had been asked"
    assert [row["bytes_down"] > 0 for row in skipping.rows()] == [True, False, False, True, True, True]
    assert skipping.read("summary.json")["loss"] == skipping.rows()[-1]["loss"]
    ending = plan(*script, "federation.quorum=3", "federation.below_quorum=end", name="end")
    with pytest.raises(ProtocolError, match=r"round 2 has 0 updates and federation.quorum=3: .*below_quorum") as caught:
        execute(ending)
    assert "\n" not in str(caught.value)
    assert [row["round"] for row in RunDirectory(ending.path).rows()] == [1]


def test_clients_that_fail_count_against_the_quorum(plan: Compose, tmp_path: Path) -> None:
    """Two of three fail from round 2 on, which is tolerated; the strategy is not asked to merge what is left."""

    class Flaky(ClientApp):
        def __call__(self, message: Message, context: Any) -> Message:
            at = message.content.config_records[codec.CONFIG]["server-round"]
            if at != 1 and context.node_config["partition-id"] != 0:
                raise RuntimeError("no power")
            return app(message, context)

    options = ("strategy=fedadam", "federation.rounds=3")
    rundir = run_in(
        InProcessGrid(Flaky(), 3, 2, fail_fast=False),
        plan(*options, "federation.tolerate=2", "federation.quorum=2", name="flaky"),
    )
    assert [(row["clients"], row["failures"]) for row in rundir.rows()] == [(3, 0), (1, 2), (1, 2)]
    (tmp_path / "first.jsonl").write_text("".join(json.dumps({"round": 1, "client": c}) + "\n" for c in range(3)))
    replay = ("participation=replay", f"participation.path={tmp_path / 'first.jsonl'}")
    assert_same(final_arrays(rundir), final_arrays(execute(plan(*options, *replay, name="once"))))


def test_a_run_to_which_nobody_comes(plan: Compose, tmp_path: Path) -> None:
    (tmp_path / "night.json").write_text("[[]]")
    night = ("available@participation.available=trace", f"participation.available.path={tmp_path / 'night.json'}")
    rundir = execute(plan(*night, "evaluate.every=1"))
    assert rundir.read("summary.json")["loss"] is None
    assert [row["skipped"] for row in rundir.rows()] == [True, True]
    assert all("knn_accuracy" in row for row in rundir.rows()), "the model is measured as ever"
    initial = to_arrays(build_model(plan().job, (3, 8, 8)))
    assert_same(final_arrays(rundir), {key: initial[key] for key in final_arrays(rundir)})
    from fedssl.report import finish_report

    assert finish_report(rundir)


def test_a_trace_that_is_not_there_ends_the_run_before_it_begins(plan: Compose) -> None:
    chosen = plan("available@participation.available=trace", "participation.available.path=nowhere.json")
    with pytest.raises(FedsslError, match="nowhere.json cannot be read"):
        execute(chosen)
    assert not (chosen.path / "manifest.json").exists()


def test_whole_turns_share_the_strategys_message() -> None:
    """A million clients, one record: only turns that differ have their own."""
    content = codec.instruction(codec.encode({KEY: np.zeros(3, np.float32)}), codec.ConfigRecord({"job": "x"}))
    with InProcessGrid(app, 3):
        plain, half = (Message(content, node, "train") for node in (1, 2))
    turns.instruct(plain, Turn(0, 4), 5, turns.History())
    assert plain.content is content
    turns.instruct(half, Turn(1, 4, 0.5), 5, turns.History(merges=[1, 3]))
    assert half.content[codec.ARRAYS] is content[codec.ARRAYS]
    assert dict(half.content.config_records[codec.CONFIG]) == {"job": "x", "begun": 5, "work": 0.5, "made": 3}
    assert dict(content.config_records[codec.CONFIG]) == {"job": "x"}
