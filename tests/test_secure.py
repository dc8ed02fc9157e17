"""Aggregations behind masks: options, the conversation with drop-outs at each step, noise; and whole runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import assert_same, execute, final_arrays
from hypothesis import given
from hypothesis import strategies as st

from fedssl.aggregation.base import Memory, Occasion, Planned, Scalar, Sender, Told
from fedssl.config import Plan
from fedssl.errors import ConfigError, PrivacyError, ProtocolError
from fedssl.flower import codec
from fedssl.flower.aggregation.clients import STATE
from fedssl.flower.aggregation.server import Aggregator
from fedssl.flower.in_process import InProcessGrid
from fedssl.participation.buffered import Buffered
from fedssl.participation.synchronous import Synchronous
from fedssl.parts import Arrays
from fedssl.privacy.clients.secure import Secure
from fedssl.privacy.clients.secure_dp import SecureDP
from fedssl.privacy.release import concentrated_epsilon, gaussian_epsilon
from fedssl.privacy.secagg.hidden import VECTOR, Hidden

Compose = Callable[..., Plan]
CLIENTS = 5
STEPS = ("advertise", "share", "train", "reveal")
MODEL = {
    "encoder.w": np.array([[0.5, -1.0]], np.float32),
    "encoder.n": np.array(3, np.int64),
    "head.b": np.array(2.0, np.float32),
}
FLOATS = {key: value for key, value in MODEL.items() if value.dtype == np.float32}
PLAN = Planned(CLIENTS, 3, 0, Synchronous())


class Devices:
    """Clients without Flower: what each remembers, and at which step some are gone."""

    def __init__(self, options: Hidden, gone: Mapping[int, str] | None = None) -> None:
        self.options, self.gone = options, gone or {}
        self.secrets: dict[int, Told] = {}
        self.questions: list[Told] = []

    def there(self, client: int, step: str) -> bool:
        return client not in self.gone or STEPS.index(self.gone[client]) > STEPS.index(step)

    def ask(self, questions: Mapping[int, Told]) -> dict[int, Told]:
        answers = {}
        for client, question in questions.items():
            self.questions.append(question)
            if self.there(client, str(question["step"])):
                said, self.secrets[client] = self.options.answer(question, self.secrets.get(client, {}), client)
                answers[client] = said
        return answers

    def send(self, change: Arrays, told: Told, client: int, at: int = 1) -> Arrays:
        words: dict[str, Scalar] = {**told, **{f"own.{k}": v for k, v in self.secrets.get(client, {}).items()}}
        sender = Sender(client, at, 1, 20, 0)
        wire = self.options.send(change, words, sender)
        self.secrets[client] = self.options.sent(words, sender)
        return wire


def changes(model: Mapping[str, np.ndarray]) -> dict[int, Arrays]:
    """A client's change is its number plus one, times 0.1, or two for whole numbers."""
    return {
        c: {
            key: np.asarray(np.full(value.shape, (c + 1) * (0.1 if value.dtype == np.float32 else 2.0)))
            for key, value in model.items()
        }
        for c in range(CLIENTS)
    }


def one_round(devices: Devices, model: Arrays = MODEL, lost: tuple[int, ...] = ()) -> tuple[Any, list[int]]:
    """A round's outcome, and whose updates are in it."""
    awaited = [c for c in range(CLIENTS) if c not in lost]
    session = devices.options.open(model, Occasion(1, 1, awaited, lost), Memory(), PLAN, devices.ask)
    came = []
    for client, change in changes(model).items():
        told = session.told(client)
        if client in awaited and devices.there(client, "train") and told:
            session.add(client, devices.send(change, told, client))
            came.append(client)
    return session.finish(), came


@pytest.mark.parametrize("step", STEPS)
def test_who_is_gone_at_a_step_is_recovered(step: str) -> None:
    devices = Devices(Secure(threshold=0.6), {1: step, 3: step})
    outcome, came = one_round(devices)
    assert came == ([0, 1, 2, 3, 4] if step == "reveal" else [0, 2, 4])
    mean = np.mean([c + 1 for c in came])
    step_of_grid = Secure().grid(CLIENTS, 4).step
    np.testing.assert_allclose(outcome.change["encoder.w"], np.full((1, 2), 0.1 * mean), atol=step_of_grid)
    np.testing.assert_allclose(outcome.change["head.b"], 0.1 * mean, atol=step_of_grid)
    assert outcome.change["head.b"].shape == ()
    assert outcome.change["encoder.n"] == pytest.approx(2 * mean, abs=1e-12)  # whole numbers are exact
    for client in set(range(CLIENTS)) - {1, 3}:
        assert not devices.secrets[client], "secrets outlive the round"


@pytest.mark.parametrize("step", STEPS)
def test_too_few_are_one_sentence(step: str) -> None:
    sentence = "2 clients .* and the threshold of secure aggregation is 4, so the sum stays hidden"
    with pytest.raises(ProtocolError, match=sentence):
        one_round(Devices(Secure(threshold=0.8), dict.fromkeys([0, 1, 3], step)))


def test_who_is_lost_has_shared_its_secrets_before() -> None:
    devices = Devices(Secure(threshold=0.6))
    outcome, came = one_round(devices, lost=(2, 4))
    assert came == [0, 1, 3]
    np.testing.assert_allclose(outcome.change["head.b"], 0.1 * np.mean([1, 2, 4]), atol=1e-6)
    assert sum(question["step"] == "share" for question in devices.questions) == CLIENTS


def test_a_step_is_done_once_and_in_order() -> None:
    devices = Devices(Secure())
    one_round(devices)
    share, reveal = (next(q for q in devices.questions if q["step"] == step) for step in ("share", "reveal"))
    sentence = "client 0 was asked for a step of secure aggregation that it is not at, so it answers nothing"
    for question in (share, reveal):
        with pytest.raises(ProtocolError, match=sentence):
            devices.ask({0: question})
    devices.ask({0: {"step": "advertise"}})
    with pytest.raises(ProtocolError, match="is not at"):
        devices.ask({0: reveal})
    with pytest.raises(ProtocolError, match="exchanged no keys before this round"):
        devices.send(changes(MODEL)[0], {}, 0)


def test_once_the_vector_is_sent_no_secret_of_its_own_is_left() -> None:
    devices = Devices(Secure())
    session = devices.options.open(MODEL, Occasion(1, 1, range(CLIENTS)), Memory(), PLAN, devices.ask)
    secret = [devices.secrets[0][key] for key in ("sealing_seed", "masking_seed", "own_seed")]
    devices.send(changes(MODEL)[0], session.told(0), 0)
    held = devices.secrets[0]
    assert {key.partition(".")[0] for key in held} == {
        *("at", "name", "threshold", "colluders", "ring", "reach", "shares", "held"),
    }
    assert not any(isinstance(v, bytes) and isinstance(s, bytes) and s in v for v in held.values() for s in secret)


def test_a_vector_of_another_shape_is_refused() -> None:
    devices = Devices(Secure())
    session = devices.options.open(MODEL, Occasion(1, 1, range(CLIENTS)), Memory(), PLAN, devices.ask)
    for wire in ({}, {VECTOR: np.zeros(3, np.uint32)}, {VECTOR: np.zeros(4, np.uint64)}):
        with pytest.raises(ProtocolError, match="client 1 sent no vector of 4 numbers of 32 bits"):
            session.add(1, wire)


def test_nobody_asked_is_a_skipped_round_and_one_client_is_refused() -> None:
    devices = Devices(Secure())
    assert devices.options.open(MODEL, Occasion(1, 1, []), Memory(), PLAN, devices.ask).finish() is None
    with pytest.raises(ConfigError, match=r"the sum over one hides nothing: .* federation.quorum=2"):
        devices.options.open(MODEL, Occasion(1, 1, [0]), Memory(), PLAN, devices.ask)
    with pytest.raises(ConfigError, match="hides nothing"):
        Secure().admit(Planned(1, 3, 0, Synchronous()))
    with pytest.raises(ConfigError, match="cannot be added behind masks"):
        Secure().admit(Planned(9, 3, 0, Buffered()))


@given(st.integers(2, 300), st.floats(0.5, 1, exclude_min=True))
def test_the_threshold_is_more_than_half(clients: int, share: float) -> None:
    fewest = Secure(threshold=share).fewest(clients)
    assert clients / 2 < fewest <= clients
    assert fewest >= share * clients - 1e-6


def test_wrong_options_are_refused() -> None:
    for make, word in (
        (lambda: Secure(threshold=0.5), "two halves of the clients"),
        (lambda: Secure(colluding=0.5), "half of the clients"),
        (lambda: Secure(bits=16), "use 32 or 64"),
        (lambda: Secure(limit=0.0), "lets nothing through"),
        (lambda: SecureDP(clip=0.0), "bounds no update"),
        (lambda: SecureDP(noise_multiplier=0.0), "fix no noise"),
        (lambda: SecureDP(delta=1.0), "no probability of failure"),
    ):
        with pytest.raises((ConfigError, PrivacyError), match=word):
            make()


# Noise


def test_the_noise_is_counted_for_the_fewest() -> None:
    options = SecureDP(threshold=0.6, noise_multiplier=2.0)
    mechanism = options.mechanism(CLIENTS, 3)
    assert mechanism.fewest == 3
    assert mechanism.rho == pytest.approx(1 / 8, rel=1e-5)
    assert mechanism.deviation >= 2 * mechanism.norm / math.sqrt(3)
    entry = options.entry(PLAN, 2, 1)
    assert (entry.noise_multiplier, entry.sample_rate, entry.count, entry.concentrated) == (2.0, 1.0, 1, True)
    assert options.entry(Planned(CLIENTS, 3, 0, Synchronous(fraction=1e-9, draw="poisson")), 2, 1).count == 0
    outcome, _ = one_round(Devices(options))
    assert outcome.change["encoder.n"] == 0  # the server keeps its counters
    assert outcome.change["head.b"] != 0


def test_the_seed_repeats_the_noise_and_the_system_does_not() -> None:
    def sent(options: SecureDP, client: int = 0, at: int = 1, attempt: int = 1) -> list[int]:
        found = options.encode(np.zeros(3), CLIENTS, Sender(client, at, attempt, 9, 0))
        return [int(number) for number in found]

    seeded = SecureDP()
    assert sent(seeded) == sent(seeded)
    others = [sent(seeded), sent(seeded, client=1), sent(seeded, at=2), sent(seeded, attempt=2)]
    assert len({tuple(numbers) for numbers in others}) == 4
    assert sent(SecureDP(secure=True)) != sent(SecureDP(secure=True))


# Runs

SGD = ("method=byol", "local.optimizer=sgd", "local.lr=0.01")
NOISY = ("method=byol", "aggregation=secure_dp", "encoder.norm=group", "method.norm=layer")


def test_it_is_the_uniform_mean_up_to_a_step_and_the_server_sees_noise(
    plan: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    original = Aggregator.one

    def spy(self: Aggregator, replies: Any, *rest: Any) -> Any:
        replies = list(replies)
        seen.extend(reply.content for reply in replies)
        return original(self, iter(replies), *rest)

    monkeypatch.setattr(Aggregator, "one", spy)
    common = (*SGD, "federation.rounds=1", "encoder.norm=batch", "evaluate.every=1")
    secure = execute(plan(*common, "aggregation=secure", name="secure"))
    uniform = final_arrays(execute(plan(*common, "strategy.weighting=uniform", name="plain")))
    step = Secure().grid(3, 1).step
    arrays = final_arrays(secure)
    for key, value in uniform.items():
        if value.dtype == np.float32:
            np.testing.assert_allclose(arrays[key], value, rtol=1e-6, atol=step, err_msg=key)
        else:
            np.testing.assert_array_equal(arrays[key], value)
    assert len(seen) == 3
    for content in seen:
        assert set(content.array_records[codec.ARRAYS]) == {VECTOR}
        assert set(content.metric_records[codec.METRICS]) == {"partition-id"}
        vector = codec.decode(content.array_records[codec.ARRAYS])[VECTOR]
        high = np.bincount(vector >> np.uint32(28), minlength=16)
        assert (np.abs(high / vector.size - 1 / 16) < 5 * math.sqrt(1 / 16 / vector.size)).all()
    assert all(row.keys() == {"round", "client", "bytes_up"} for row in secure.rows("clients.jsonl"))
    assert not {"loss", "drift", "epsilon", "client_cka"} & secure.rows()[0].keys()
    assert secure.read("summary.json")["epsilon"] is None
    assert secure.read("payload.json")["bytes_up"] == secure.rows("clients.jsonl")[0]["bytes_up"]


def test_clients_that_drop_out_are_recovered(plan: Compose) -> None:
    common = (*SGD, "federation.clients=6", "participation=stragglers", "participation.fraction=1.0")
    common = (*common, "participation.dropout=0.2", "federation.rounds=2", "local.clip_norm=1.0")
    secure = execute(plan(*common, "aggregation=secure", "aggregation.threshold=0.6", name="secure"))
    mean = execute(plan(*common, "aggregation=mean", name="mean"))
    assert sum(row.get("dropped", 0) for row in secure.rows()) >= 1
    assert [row["clients"] for row in secure.rows()] == [row["clients"] for row in mean.rows()]
    arrays = final_arrays(secure)
    for key, value in final_arrays(mean).items():
        np.testing.assert_allclose(arrays[key], value, rtol=1e-4, atol=1e-5, err_msg=key)


def test_a_client_that_fails_is_recovered_and_secrets_end_with_the_round(
    plan: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedssl.flower import client_app

    contexts: dict[int, Any] = {}
    train, leave = client_app.fit, InProcessGrid.__exit__

    def failing(*args: Any, **kwargs: Any) -> Any:
        if kwargs["client"] == 1:
            raise RuntimeError("the battery is empty")
        return train(*args, **kwargs)

    def leaving(self: InProcessGrid, *error: Any) -> None:
        contexts.update(self.contexts)
        leave(self, *error)

    monkeypatch.setattr(client_app, "fit", failing)
    monkeypatch.setattr(InProcessGrid, "__exit__", leaving)
    common = (*SGD, "federation.clients=4", "federation.tolerate=1", "federation.rounds=1")
    secure = execute(plan(*common, "aggregation=secure", name="secure"))
    assert [(row["clients"], row["failures"]) for row in secure.rows()] == [(3, 1)]
    for node, context in contexts.items():
        left = dict(context.state.config_records[STATE])
        assert not left or node == 2, left  # the one that failed forgets when it is next asked
    uniform = final_arrays(execute(plan(*common, "strategy.weighting=uniform", name="plain")))
    arrays = final_arrays(secure)
    for key, value in uniform.items():
        np.testing.assert_allclose(arrays[key], value, rtol=1e-6, atol=Secure().grid(4, 1).step, err_msg=key)


@pytest.fixture
def gone(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, str], list[Arrays]]:
    """Lets clients 1 and 3 fail at a step of a round; gives the model after each round."""
    from fedssl.flower import client_app, turns

    def fail(at: int, step: str) -> list[Arrays]:
        rounds: list[int] = []
        models: list[Arrays] = []
        begin, answer, fit, add = Aggregator.open, Hidden.answer, client_app.fit, turns.History.add

        def opening(self: Aggregator, asked: Any, at: int, attempt: int, clients: Any) -> bool:
            rounds.append(at)
            return begin(self, asked, at, attempt, clients)

        def here(client: int, now: str) -> None:
            if client in (1, 3) and rounds[-1] == at and now == step:
                raise RuntimeError("the battery is empty")

        def answering(self: Hidden, question: Told, secrets: Told, client: int) -> Any:
            here(client, str(question["step"]))
            return answer(self, question, secrets, client)

        def fitting(*args: Any, **kwargs: Any) -> Any:
            here(kwargs["client"], "train")
            return fit(*args, **kwargs)

        def adding(self: Any, at: int, arrays: Arrays, limit: int) -> None:
            models.append(dict(arrays))
            add(self, at, arrays, limit)

        monkeypatch.setattr(Aggregator, "open", opening)
        monkeypatch.setattr(Hidden, "answer", answering)
        monkeypatch.setattr(client_app, "fit", fitting)
        monkeypatch.setattr(turns.History, "add", adding)
        return models

    return fail


FIVE = (*SGD, "federation.clients=5", "federation.rounds=3", "federation.tolerate=2")


@pytest.mark.parametrize("step", STEPS)
def test_too_few_survivors_skip_the_round(step: str, plan: Compose, gone: Callable[..., list[Arrays]]) -> None:
    models = gone(2, step)
    run = execute(plan(*FIVE, "aggregation=secure"))
    first, second, third = run.rows()
    assert second["skipped"]
    assert "3 clients" in second["reason"]
    assert "the threshold of secure aggregation is 4, so the sum stays hidden" in second["reason"]
    assert not {"skipped", "reason"} & (first.keys() | third.keys())
    came, failed = {"advertise": (0, 2), "share": (0, 2), "train": (3, 2), "reveal": (5, 0)}[step]
    assert (second["clients"], second["failures"]) == (came, failed)
    assert (second["bytes_down"] > 0) == (came > 0), "nobody trains once it is known that too few are there"
    assert_same(models[0], models[1])
    assert any((models[1][key] != models[2][key]).any() for key in models[1])


def test_more_failures_than_are_tolerated_end_the_run_all_the_same(
    plan: Compose, gone: Callable[..., list[Arrays]]
) -> None:
    gone(2, "share")
    with pytest.raises(ProtocolError, match=r"the battery is empty.*federation.tolerate=1 ends the run"):
        execute(plan(*FIVE, "federation.tolerate=1", "aggregation=secure", "aggregation.threshold=0.9"))


def test_a_skipped_round_may_end_the_run(plan: Compose, gone: Callable[..., list[Arrays]]) -> None:
    gone(1, "train")
    with pytest.raises(ProtocolError, match="round 1 ends the run by federation.below_quorum=end: 3 clients sent"):
        execute(plan(*FIVE, "federation.below_quorum=end", "aggregation=secure"))


def test_a_skipped_round_is_paid_for(plan: Compose, gone: Callable[..., list[Arrays]]) -> None:
    gone(2, "reveal")
    run = execute(plan(*NOISY, *FIVE[1:], "evaluate.every=1"))
    assert [row.get("skipped", False) for row in run.rows()] == [False, True, False]
    assert [row["epsilon"] for row in run.rows()] == [concentrated_epsilon(at / 2, 1e-5) for at in (1, 2, 3)]


def test_a_change_beyond_the_limit_ends_the_run(plan: Compose) -> None:
    with pytest.raises(ProtocolError, match=r"larger than aggregation.limit=1e-06"):
        execute(plan(*SGD, "aggregation=secure", "aggregation.limit=1e-6"))


def test_noise_in_a_run_and_its_epsilon(plan: Compose) -> None:
    still = ("local.optimizer=sgd", "local.lr=1e-9", "local.weight_decay=0")
    run = execute(plan(*NOISY, *still, "federation.rounds=1", "aggregation.noise_multiplier=0.5"))
    row, size = run.rows()[0], sum(value.size for value in final_arrays(run).values())
    mechanism = SecureDP(noise_multiplier=0.5).mechanism(3, size)
    assert row["epsilon"] == concentrated_epsilon(2.0, 1e-5) == run.read("summary.json")["epsilon"]
    assert mechanism.rho <= 2.0
    assert gaussian_epsilon(0.5, 1, 1e-5) < row["epsilon"] < 1.1 * gaussian_epsilon(0.5, 1, 1e-5)
    declared = run.read("privacy.json")
    assert declared["unit"] == "client"
    assert any("whoever knows the seed" in words for words in declared["not_covered"])
    # Nothing was learnt, so what is there is the noise of three clients, divided by three.
    start = final_arrays(execute(plan(*NOISY[:1], *NOISY[2:], *still, "federation.rounds=1", name="start")))
    noise = np.concatenate([(value - start[key]).ravel() for key, value in final_arrays(run).items()])
    wanted = mechanism.deviation * mechanism.grid.step / math.sqrt(3)
    assert abs(noise.std() / wanted - 1) < 5 / math.sqrt(2 * size)


@pytest.mark.parametrize("options", [("aggregation=secure", *SGD), NOISY])
def test_resuming_is_exact(options: tuple[str, ...], plan: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    import fedssl.flower.server as server

    whole = plan(*options, "federation.rounds=3", name="whole")
    parts = whole.at(Path(whole.path.parent / "parts"))
    original = server._round

    def stop(run: Any, strategy: Any, at: int, now: Any, initial: Any) -> Any:
        if at == 2:
            raise KeyboardInterrupt
        return original(run, strategy, at, now, initial)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(server, "_round", stop)
        execute(parts)
    first, second = execute(whole), execute(parts)
    assert_same(final_arrays(first), final_arrays(second))
    assert [row.get("epsilon") for row in first.rows()] == [row.get("epsilon") for row in second.rows()]


def test_a_round_below_the_quorum_is_skipped(plan: Compose) -> None:
    run = execute(
        plan(*SGD, "aggregation=secure", "participation=poisson", "participation.fraction=0.4", "federation.quorum=3")
    )
    for row in run.rows():
        assert row.get("skipped") or row["clients"] >= 3
    assert any(row.get("skipped") for row in run.rows())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("strategy=krum",), "Krum compares"),
        (("strategy=fedvssl",), "FedVSSL compares"),
        (("compression=int8",), "compression=none"),
        (("participation=buffered",), "behind masks"),
        (("federation.clients=1",), "hides nothing"),
    ],
)
def test_what_reads_single_updates_is_refused(options: tuple[str, ...], words: str, plan: Compose) -> None:
    with pytest.raises(ConfigError, match=words):
        plan("aggregation=secure", *options)
