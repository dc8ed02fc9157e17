"""Several clients trained at once are the clients trained one by one, within rounding, for every method."""

from __future__ import annotations

import gc
import math
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from conftest import assert_same, execute, final_arrays, tiny
from test_laws import interrupted
from test_methods import CASES, Precise

from fedssl import config
from fedssl.client import FitResult, Training
from fedssl.cohort import together
from fedssl.cohort.choice import Choice
from fedssl.cohort.seats import Meeting, seat, take
from fedssl.config import Plan
from fedssl.descent import Pull
from fedssl.diagnostics import feature_std
from fedssl.errors import ConfigError
from fedssl.gradient import PlainGradient
from fedssl.job import Job
from fedssl.job.setup import build_model, data_of, public_of
from fedssl.job.shards import shard_of
from fedssl.measures.movement import Movement
from fedssl.method import LossOutput
from fedssl.model import parameters, tensors

CPU = torch.device("cpu")
# Plain descent: adaptive steps turn the rounding of a gradient that is zero into a whole step.
PLAIN = ("local.optimizer=sgd", "local.momentum=0", "local.lr=0.05", "local.epochs=2")
UNEQUAL = ("partition=dirichlet", "partition.alpha=0.5", "partition.min_size=3", "federation.clients=6")
Compose = Callable[..., Plan]


def job_of(method: str, *overrides: str, modality: str = "images") -> Job:
    split = () if any(o.startswith("partition=") for o in overrides) else UNEQUAL
    options = tiny(f"method={method}", *PLAIN, *split, *overrides, modality=modality)
    unused = ("partition.alpha=1.0", "encoder.dim=8" if "encoder=resnet18" in overrides else "")
    return config.compose([o for o in options if o not in unused]).job


def trainings(job: Job, precise: bool = True, **options: Any) -> list[Training]:
    """All clients of a job, ready for the first step of round 1."""
    found = []
    for client in range(job.federation.clients):
        shard = shard_of(job, client, CPU)
        model = build_model(job, data_of(job, CPU).train.shape, len(shard), client)
        public = public_of(job, CPU) if job.method.reads_public else None
        if precise:
            model, shard = model.double(), Precise(shard)
            public = Precise(public) if public is not None else None
        training = Training(
            job.method, model, shard, job.data.augment, job.local, gradient=PlainGradient(),
            round=1, rounds=2, seed=job.seed, client=client, public=public, **options,
        )  # fmt: skip
        if job.tree["strategy"].get("proximal"):
            training.pull = Pull.towards_now(5.0, [p for p in training.model.parameters() if p.requires_grad])
        training.begin()
        found.append(training)
    return found


def both_ways(job: Job, precise: bool = True, **options: Any) -> tuple[list[Training], list[Training]]:
    """The clients trained one by one, and at once."""
    alone, at_once = trainings(job, precise, **options), trainings(job, precise, **options)
    for one in alone:
        one.run()
    assert together.train_together(at_once) == [None] * len(at_once)
    return alone, at_once


def assert_close(alone: Sequence[Training], at_once: Sequence[Training], tolerance: float = 1e-6) -> None:
    for one, other in zip(alone, at_once, strict=True):
        mine = dict(tensors(other.model))
        for name, value in tensors(one.model):
            assert value.shape == mine[name].shape
            torch.testing.assert_close(
                mine[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )
        a, b = one.result(), other.result()
        assert (a.examples, a.steps, a.work) == (b.examples, b.steps, b.work)
        assert flat(b) == pytest.approx(flat(a), rel=0.02, abs=2e-3, nan_ok=True)


def flat(result: FitResult) -> dict[str, float]:
    return {**result.measures, **result.movement, "loss": result.loss, "feature_std": result.feature_std}


@pytest.fixture
def none_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that is trained alone is a failure."""

    def alone(training: Training, first: object = None) -> None:
        raise AssertionError(f"client {training.client} was trained alone")

    monkeypatch.setattr(together, "_alone", alone)


@pytest.mark.usefixtures("none_alone")
@pytest.mark.parametrize(("name", "modality"), [case for case in CASES if case[1] in ("images", "timeseries")])
def test_every_method_gives_the_same_clients(name: str, modality: str) -> None:
    """Teachers, queues, banks and centres included; clients differ in size, so in batches, steps and learning rates."""
    job = job_of(name, modality=modality)
    sizes = {len(shard_of(job, client, CPU)) for client in range(6)}
    assert len(sizes) > 2
    if any(part.sized for part in job.method.parts):
        job = job_of(name, "partition=iid", "federation.clients=4", modality=modality)
    assert_close(*both_ways(job))


@pytest.mark.usefixtures("none_alone")
@pytest.mark.parametrize(
    "options",
    [
        ("local.momentum=0.9", "local.weight_decay=0.1"),
        ("local.clip_norm=0.05",),
        ("local.optimizer=adamw", "local.lr=0.001", "method.norm=layer"),
        ("encoder.norm=batch",),
        ("local.decorrelation=0.5",),
        ("strategy=fedprox",),
        ("encoder=resnet18", "encoder.width=4"),
        ("data.augment.blur=0.5", "data.augment.noise=0.1", "data.augment.rotation=20"),
        ("partition=feature_shift",),
    ],
    ids=lambda options: options[0],
)
def test_what_surrounds_a_step_is_each_clients_own(options: tuple[str, ...]) -> None:
    assert_close(*both_ways(job_of("byol", *options)))


@pytest.mark.usefixtures("none_alone")
def test_a_client_that_stops_early_stops_early() -> None:
    alone, at_once = both_ways(job_of("simclr"), work=0.6)
    assert len({one.done for one in at_once}) > 1
    assert any(one.done < one.steps for one in at_once)
    assert_close(alone, at_once)


@pytest.mark.usefixtures("none_alone")
def test_half_precision_trains_at_once() -> None:
    alone, at_once = both_ways(job_of("simsiam", "local.precision=bf16", "local.lr=0.001"), precise=False)
    for one, other in zip(alone, at_once, strict=True):
        assert other.result().loss == pytest.approx(one.result().loss, abs=0.05)


@pytest.mark.usefixtures("none_alone")
def test_channels_last_trains_at_once() -> None:
    """In float32, whose convolutions leave channels last, which torch's pooling cannot take from many at once."""
    options = ("partition=iid", "federation.clients=2", "local.lr=0.001")
    alone, at_once = both_ways(job_of("simclr", "local.channels_last=true", *options), precise=False)
    for one, other in zip(alone, at_once, strict=True):
        assert other.result().loss == pytest.approx(one.result().loss, abs=0.01)


def test_a_lone_mistake_in_the_order_would_be_seen() -> None:
    """The comparison is sharp: clients that have changed places are far apart."""
    alone, at_once = both_ways(job_of("simclr", "partition=iid", "federation.clients=4"))
    with pytest.raises(AssertionError):
        assert_close(alone, at_once[::-1])


def test_a_loss_that_cannot_be_found_at_once_is_found_one_by_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    job = job_of("byol", "encoder.norm=batch")
    genuine = type(job.method).loss

    def reads_a_number(self: Any, model: Any, batch: Any, step: Any) -> Any:
        out = genuine(self, model, batch, step)  # batch normalisations have noted their statistics by now
        return out if out.loss.item() < 1e9 else None

    monkeypatch.setattr(type(job.method), "loss", reads_a_number)
    together._say.cache_clear()
    alone, at_once = both_ways(job)
    assert "BYOL trains clients one by one" in caplog.text
    for one, other in zip(alone, at_once, strict=True):
        for (_, a), (_, b) in zip(tensors(one.model), tensors(other.model), strict=True):
            assert torch.equal(a, b), "trained by the same code on the same numbers"


@pytest.mark.parametrize("modality", ["graphs", "pairs"])
def test_views_that_are_no_tensors_train_one_by_one(modality: str) -> None:
    alone, at_once = both_ways(job_of("simclr", modality=modality), precise=False)
    assert_close(alone, at_once, tolerance=0)


def test_one_client_that_cannot_train_does_not_stop_the_others() -> None:
    """A single example has no batch statistics."""
    some = trainings(job_of("byol", "partition=iid", "federation.clients=4"))
    lone = some[2]
    lone.batches = [index[:1] for index in lone.batches]
    failures = together.train_together(some)
    assert isinstance(failures[2], ConfigError)
    assert failures[:2] + failures[3:] == [None] * 3
    assert all(math.isfinite(some[k].result().loss) for k in (0, 1, 3))


@pytest.mark.parametrize("work", [1.0, 0.5])
@pytest.mark.parametrize("method", ["simclr", "byol", "fedx"])
def test_what_is_measured_for_all_at_once_is_what_each_client_would_measure(
    method: str, work: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients take different numbers of steps: teachers are remembered at different ones, and last batches differ."""
    some = [one for one in trainings(job_of(method), work=work) if one.done]
    assert len({one.steps for one in some}) > 1
    watched = {one.client: Movement(parameters(one.model), one.method.parts) for one in some}
    stepped = Training.stepped

    def remembering(self: Training, i: int, out: LossOutput) -> None:
        if i == self.steps - 1:
            watched[self.client].before_following()
        stepped(self, i, out)

    monkeypatch.setattr(Training, "stepped", remembering)
    assert together.train_together(some) == [None] * len(some)
    assert {one.joint is not None for one in some} == {work == 1}, "found together if all take all steps"
    for one in some:
        gauges, features = one.gauges(), one.features
        assert features is not None
        assert gauges.feature_std == pytest.approx(feature_std(features.float()), rel=1e-12)
        assert gauges.movement == pytest.approx(watched[one.client].measures()[0], rel=1e-9, abs=1e-12)
        if work == 1:
            assert gauges.movement["encoder_moved"] > 0
            assert method != "byol" or gauges.movement["teacher_step"] > 0


def in_threads(one: Callable[[int], None], numbers: Iterable[int]) -> None:
    """Call it with each number in a thread of its own, and wait for all."""
    threads = [threading.Thread(target=one, args=(number,)) for number in numbers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)


def test_seats_wait_for_those_who_come_and_for_nobody_else() -> None:
    seen: list[list[int]] = []

    class Client:
        def __init__(self, number: int) -> None:
            self.number = number

        def run(self) -> None:
            raise AssertionError("it has a seat")

    def train(there: Sequence[Client]) -> list[BaseException | None]:
        seen.append([client.number for client in there])
        return [KeyError(client.number) if client.number == 3 else None for client in there]

    meeting: Meeting[Client] = Meeting(4, train)
    raised: list[BaseException] = []

    def one(number: int) -> None:
        try:
            with seat(meeting, number):
                if number == 1:
                    raise ValueError("it fails before it trains")
                take(Client(number))
        except (KeyError, ValueError) as error:
            raised.append(error)

    in_threads(one, (2, 0, 3, 1))
    assert seen == [[0, 2, 3]], "in the order of the seats"
    assert sorted(type(error).__name__ for error in raised) == ["KeyError", "ValueError"]


@pytest.mark.parametrize("run", [together.train_together, lambda some: [one.run() for one in some]])
def test_training_is_freed_as_soon_as_nobody_needs_it(run: Callable[[list[Training]], object]) -> None:
    """It holds copies of the model; what waits for Python's collector of cycles may wait for many clients."""
    some = trainings(job_of("byol"))
    gc.collect()
    gc.disable()
    try:
        run(some)
        assert all(math.isfinite(one.result().feature_std) for one in some)
        alive = [weakref.ref(one) for one in some]
        some.clear()
        assert [one() for one in alive] == [None] * len(alive)
    finally:
        gc.enable()


def test_what_ends_a_whole_cohort_has_one_origin_in_each_seat() -> None:
    """A traceback that sixteen seats have added to says nothing to anybody."""

    def train(there: Sequence[Any]) -> list[BaseException | None]:
        raise KeyError("the second step of all")

    meeting: Meeting[Any] = Meeting(16, train)
    lengths: list[int] = []

    def one(number: int) -> None:
        try:
            with seat(meeting, number):
                take(object())  # type: ignore[arg-type]
        except KeyError as error:
            lengths.append(len(traceback.extract_tb(error.__traceback__)))

    in_threads(one, range(16))
    assert len(lengths) == 16
    assert max(lengths) < 10


def test_an_interrupted_cohort_trains_nobody() -> None:
    """The main thread may be the last that the others wait for; to train them all first would be no end."""
    trained: list[object] = []

    def train(there: Sequence[Any]) -> list[BaseException | None]:
        trained.extend(there)
        return [None] * len(there)

    meeting: Meeting[Any] = Meeting(3, train)
    raised: list[BaseException] = []

    def other(number: int) -> None:
        try:
            with seat(meeting, number):
                take(object())  # type: ignore[arg-type]
        except KeyboardInterrupt as error:
            raised.append(error)

    early, late = (threading.Thread(target=other, args=(number,)) for number in (1, 2))
    early.start()
    while not meeting._there:
        time.sleep(0.001)
    with pytest.raises(KeyboardInterrupt), seat(meeting, 0):
        raise KeyboardInterrupt
    late.start()
    for thread in (early, late):
        thread.join(timeout=20)
    assert len(raised) == 2
    assert not trained


def test_one_thread_of_a_cohort_runs_at_a_time() -> None:
    """Before they sit down and after they have been trained, in whatever order; training waits for nobody's floor."""
    running, most = set[int](), []

    def train(there: Sequence[Any]) -> list[BaseException | None]:
        return [None] * len(there)

    meeting: Meeting[Any] = Meeting(5, train)

    def busy(number: int) -> None:
        running.add(number)
        time.sleep(0.01)  # lets go of Python's lock, as calls of torch do
        most.append(len(running))
        running.discard(number)

    def one(number: int) -> None:
        with seat(meeting, number):
            busy(number)
            if number != 1:  # this one leaves without
                take(object())  # type: ignore[arg-type]
            busy(number)

    in_threads(one, range(5))
    assert most == [1] * 10


def test_the_fastest_size_is_chosen_by_what_was_measured() -> None:
    found: list[int] = []
    choice = Choice(None, 100, lambda size, seconds: found.append(size))
    cost = {32: 0.5, 8: 0.2, 1: 1.0}
    for _ in range(2):
        for size in (32, 8, 1):
            assert choice.next(100) == size
    assert choice.next(100) == 1, "nothing is known yet"
    for size in (32, 8, 1, 1):
        choice.took(size, 10, 10 * cost[size])
    choice.took(32, 10, 5.0)
    assert not found
    choice.took(8, 0, 9.0)  # no step, no measurement
    choice.took(10, 10, 0.1)  # the last ones of a round: no candidate
    choice.took(8, 10, 4.0)  # slower than its first turn: the better one counts
    assert found == [8]
    assert (choice.next(100), choice.next(3)) == (8, 3)
    few = Choice(None, 5)
    assert [few.next(5), few.next(4)] == [1, 1], "no cohort is larger than the federation"


RUN = ("engine.cohort=3", "federation.clients=7", "partition=dirichlet", "partition.min_size=4", "data.train=90")


def test_a_run_in_cohorts_is_the_same_with_any_workers_and_close_to_one_by_one(plan: Compose) -> None:
    method = (
        "method=byol",
        "method.norm=layer",
        "strategy.share.teacher=local",
        "local.optimizer=sgd",
        "local.lr=0.01",
    )
    one = execute(plan(*RUN, *method, "engine.workers=1", name="one"))
    two = execute(plan(*RUN, *method, "engine.workers=2", name="two"))
    assert_same(final_arrays(one), final_arrays(two))
    alone = execute(plan(*RUN[1:], *method, name="alone"))
    for key, value in final_arrays(alone).items():
        assert np.linalg.norm(final_arrays(one)[key] - value) <= 0.01 * np.linalg.norm(value) + 1e-4, key
    assert [row["client"] for row in one.rows("clients.jsonl")] == [
        row["client"] for row in alone.rows("clients.jsonl")
    ]


def test_a_run_in_cohorts_resumes_to_the_same_bits(plan: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    options = (*RUN, "method=moco", "method.queue=16", "federation.rounds=3")
    straight = execute(plan(*options, name="straight"))
    interrupted(plan(*options, name="broken"), 1, monkeypatch)
    assert_same(final_arrays(straight), final_arrays(execute(plan(*options, name="broken"))))


def test_auto_keeps_to_what_it_found(plan: Compose) -> None:
    options = ("engine.cohort=auto", "federation.clients=9", "partition=iid", "federation.rounds=3", "data.train=90")
    rundir = execute(plan(*options))
    found = (rundir.path / "cohort.json").read_text()
    assert '"8"' in found
    assert '"32"' not in found, "there are only nine clients"
    execute(plan(*options, "federation.rounds=3"))
    assert (rundir.path / "cohort.json").read_text() == found


@pytest.mark.parametrize("size", ["0", "-3", "many"])
def test_sizes_that_make_no_sense_are_refused(size: str, plan: Compose) -> None:
    with pytest.raises(ConfigError, match="give 1 client or more, or auto"):
        plan(f"engine.cohort={size}").build_engine()
