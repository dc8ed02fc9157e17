"""What a device demands of jobs that claim something of clients, and the account that a client keeps of itself."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from conftest import execute

from fedssl.aggregation.base import Planned
from fedssl.aggregation.spending import planned
from fedssl.config import Plan
from fedssl.errors import PrivacyError
from fedssl.flower.aggregation.server import Aggregator
from fedssl.flower.codec import ClientState
from fedssl.flower.in_process import InProcessGrid
from fedssl.flower.state_files import newest, read
from fedssl.gradient import PlainGradient
from fedssl.participation.cohorts import Cohorts
from fedssl.participation.synchronous import Synchronous
from fedssl.privacy.clients.client_dp import ClientDP
from fedssl.privacy.clients.ftrl import FTRL
from fedssl.privacy.clients.local_dp import SPREAD, LocalDP
from fedssl.privacy.clients.secure import Secure
from fedssl.privacy.clients.secure_dp import SecureDP
from fedssl.privacy.example_dp import ExampleDP
from fedssl.privacy.ledger import Ledger
from fedssl.privacy.release import gaussian_epsilon
from fedssl.privacy.spending import agree, pay_turn
from fedssl.progress import Reporter

Compose = Callable[..., Plan]
DELTA = 1e-5
PLAN = Planned(6, 4, 0, Cohorts(2))
LOCAL = LocalDP(delta=DELTA, target_epsilon=4.0)
PLAIN = PlainGradient()


@pytest.mark.parametrize(
    ("dp", "floor", "sentence"),
    [
        (LOCAL, {"max-epsilon": 2.0}, "allows epsilon 2.0 and the job asks for 4"),
        (LOCAL, {"max-delta": 1e-6}, "allows delta 1e-06"),
        (LOCAL, {"secure-noise": True}, "aggregation.secure=true"),
        (SecureDP(), {"max-epsilon": 1.0}, "allows epsilon 1.0 and the job asks for"),
        (SecureDP(), {"secure-noise": True}, "follows from a seed: set aggregation.secure=true"),
        (ClientDP(delta=DELTA), {"max-epsilon": 99.0}, "does not trust the server"),
        (ClientDP(delta=DELTA), {"max-epsilon": 1.0, "trust-server": True}, "allows epsilon 1.0"),
        (FTRL(delta=DELTA, band=2), {"secure-noise": True, "trust-server": True}, "aggregation.secure=true"),
        (Secure(), {"max-epsilon": 99.0}, "claims no privacy"),
    ],
)
def test_a_weaker_job_of_clients_is_refused(dp: Any, floor: dict[str, object], sentence: str) -> None:
    with pytest.raises(PrivacyError, match=re.escape(sentence)):
        agree(PLAIN, floor, dp, PLAN)


def test_a_job_that_meets_the_floor_is_not_refused() -> None:
    agree(PLAIN, {}, ClientDP(delta=DELTA), PLAN)
    agree(PLAIN, {"max-epsilon": 4.0, "max-delta": DELTA}, LOCAL, PLAN)
    agree(PLAIN, {"secure-noise": True}, SecureDP(secure=True), PLAN)
    agree(PLAIN, {"max-epsilon": 99.0, "trust-server": True}, ClientDP(delta=DELTA), PLAN)


def test_every_claim_of_a_job_must_meet_the_floor() -> None:
    record = ExampleDP(epsilon=2.0, sample_rate=0.5).planned(20, 10, 1, 1)
    agree(record, {"max-epsilon": 8.0}, ClientDP(delta=DELTA), PLAN)  # records are safe from the server already
    with pytest.raises(PrivacyError, match="allows epsilon 3.0"):
        agree(record, {"max-epsilon": 3.0}, ClientDP(delta=DELTA), PLAN)


def test_repeated_rounds_count_against_the_floor() -> None:
    dp, always = SecureDP(), Planned(3, 1, 0, Synchronous())
    most = planned(dp, always).epsilon(DELTA) + 0.01
    assert most > gaussian_epsilon(1.0, 1, DELTA), "noise in whole steps costs more"
    agree(PLAIN, {"max-epsilon": most}, dp, always)
    with pytest.raises(PrivacyError, match="allows epsilon"):
        agree(PLAIN, {"max-epsilon": most}, dp, always, [(1, 1)])


def paid(text: str, turn: tuple[int, int], *lost: tuple[int, int], floor: Any = None, spread: float = 1.0) -> str:
    told = {SPREAD: spread * 2 * LOCAL.clip * LOCAL.multiplier(PLAN)}
    return pay_turn(LOCAL, PLAN, text, turn, lost, told, floor or {})


def test_a_client_pays_for_its_turns_and_for_what_was_lost() -> None:
    once = paid("", (1, 1))
    assert Ledger.read(once).epsilon(DELTA) == pytest.approx(gaussian_epsilon(LOCAL.multiplier(PLAN), 1, DELTA))
    assert Ledger.read(paid(once, (3, 1))).epsilon(DELTA) == pytest.approx(4.0), "both turns are the target"
    with pytest.raises(PrivacyError, match="above 4: it does not train"):
        paid(once, (3, 2), (3, 1))
    with pytest.raises(PrivacyError, match="whose noise is spent"):
        paid(once, (1, 1))
    with pytest.raises(PrivacyError, match="where the job's is"):
        paid("", (1, 1), spread=0.5)
    with pytest.raises(PrivacyError, match="above 3: it does not train"):
        paid(once, (3, 1), floor={"max-epsilon": 3.0})
    assert pay_turn(ClientDP(), PLAN, "", (1, 1), (), {}, {}) == ""


OPTIONS = ("aggregation=local_dp", "aggregation.delta=1e-5", "aggregation.target_epsilon=null", "federation.rounds=3")


def test_the_account_survives_a_kill_and_a_resume(plan: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    run = plan(*OPTIONS, "aggregation.noise_multiplier=2.0")
    original = Aggregator.one

    def killed(self: Aggregator, *rest: Any) -> Any:
        found = list(original(self, *rest))
        if len(self.ledger.entries) == 2:
            raise KeyboardInterrupt
        yield from found

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Aggregator, "one", killed)
        execute(run)
    rundir = execute(run)
    for client in range(3):
        path = newest(rundir.clients, client, 3)
        assert path is not None
        entries = Ledger.read(read(path).own).entries
        assert [(entry.round, entry.attempt) for entry in entries] == [(1, 1), (2, 1), (2, 2), (3, 1)]


def test_nodes_refuse_and_keep_their_ledger_before_they_send(plan: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    make = InProcessGrid._make

    def demanding(self: InProcessGrid, node: int) -> Any:
        found = make(self, node)
        found.node_config["max-epsilon"] = 3.0
        return found

    monkeypatch.setattr(InProcessGrid, "_make", demanding)
    with pytest.raises(PrivacyError, match=r"allows epsilon 3\.0"):
        execute(plan(*OPTIONS, "aggregation.noise_multiplier=2.0", name="weak"))
    monkeypatch.setattr("fedssl.flower.client_app.fit", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    seen: list[str] = []
    save = ClientState.save

    def noted(self: ClientState, where: Any) -> None:
        seen.append(self.own)
        save(self, where)

    monkeypatch.setattr(ClientState, "save", noted)
    with pytest.raises(KeyboardInterrupt):
        execute(plan(*OPTIONS, "aggregation.noise_multiplier=9.0", name="strong"))
    assert seen
    assert all(Ledger.read(text).entries for text in seen), "paid before training"


def test_a_seed_is_declared_where_clients_are_elsewhere(plan: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(Reporter, "say", lambda self, sentence: said.append(sentence))
    for secure in ("false", "true"):
        job = plan("aggregation=secure_dp", f"aggregation.secure={secure}").job
        aggregator = Aggregator(job, None, {}, job.aggregation.begin(job.planned), 0)  # type: ignore[arg-type]
        aggregator.announce(Reporter(quiet=True), 10)
        assert any("follows from the seed" in sentence for sentence in said) == (secure == "false")
        said.clear()
