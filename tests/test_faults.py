"""What a deployment meets: nodes that forget, spoil, are late or gone, disks that are full, a server that is killed."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import assert_same, execute, final_arrays
from deployed.link import Link, configs, run_on
from deployed.spoilt import KEY, SPOILT, at_round, swap, value
from flwr.app import Array, Context, Message

from fedssl.config import Plan
from fedssl.errors import ConfigError, ProtocolError, ResumeError
from fedssl.flower import server, state_files
from fedssl.flower.deploy import site
from fedssl.privacy import statement
from fedssl.privacy.ledger import Ledger
from fedssl.rundir import RunDirectory

Compose = Callable[..., Plan]
TEACHER = ("method=byol", "strategy.share.teacher=local", "compression=topk_int8", "federation.rounds=3")
FORGIVING = ("federation.tolerate=null", "federation.quorum=0.5")


def failures(rundir: RunDirectory) -> list[tuple[int, int]]:
    return [(row["round"], row["client"]) for row in rundir.rows("failures.jsonl")]


def same_in_one_process(rundir: RunDirectory, plan: Compose, *options: str) -> None:
    """The run has the arrays of a simulation in which the same clients took part."""
    chosen = [*options, "participation=replay", f"participation.path={rundir.path / 'clients.jsonl'}"]
    assert_same(final_arrays(rundir), final_arrays(execute(plan(*chosen, name="simulated"))))


def test_nodes_with_a_state_dir_outlive_their_processes(plan: Compose, tmp_path: Path) -> None:
    link: Link

    def kill(message: Message, context: Context, reply: Message) -> Message:
        if at_round(message) == 2 and context.node_config["partition-id"] == 2:  # after the last reply of a round
            link.restart_all()
        return reply

    link = Link(configs(3, **{"state-dir": str(tmp_path / "node")}), kill)
    killed = run_on(link, plan(*TEACHER, name="killed"))
    assert_same(final_arrays(killed), final_arrays(execute(plan(*TEACHER, name="straight"))))
    (folder,) = (tmp_path / "node").iterdir()
    assert folder.name == killed.identity()
    assert {path.name for path in folder.iterdir()} >= {f"{c:06d}-000003.safetensors" for c in range(3)}


def test_a_node_that_forgets_is_refused_and_the_others_go_on(plan: Compose) -> None:
    link: Link

    def kill(message: Message, context: Context, reply: Message) -> Message:
        if at_round(message) == 1 and context.node_config["partition-id"] == 1:
            link.start(dict(context.node_config), context.node_id)
        return reply

    link = Link(configs(3), kill)
    rundir = run_on(link, plan(*TEACHER, *FORGIVING))
    assert failures(rundir) == [(2, 1), (3, 1)]
    why = rundir.rows("failures.jsonl")[0]["why"]
    assert why.startswith("client 1 trained in round 1, and its node has no state-dir and has forgotten")
    assert [row["clients"] for row in rundir.rows()] == [3, 2, 2]
    same_in_one_process(rundir, plan, *TEACHER)
    with pytest.raises(ProtocolError, match=r"has forgotten what it kept.*federation.tolerate=0 ends the run"):
        link = Link(configs(3), kill)
        run_on(link, plan(*TEACHER, name="strict"))


def test_a_damaged_state_is_one_sentence_that_names_the_file(plan: Compose, tmp_path: Path) -> None:
    def spoil(message: Message, context: Context, reply: Message) -> Message:
        if at_round(message) == 1 and context.node_config["partition-id"] == 0:
            (path,) = tmp_path.glob("node/*/000000-000001.safetensors")
            path.write_bytes(path.read_bytes()[:-7])
        return reply

    link = Link(configs(3, **{"state-dir": str(tmp_path / "node")}), spoil)
    rundir = run_on(link, plan(*TEACHER, *FORGIVING))
    assert failures(rundir) == [(2, 0), (3, 0)]
    why = rundir.rows("failures.jsonl")[0]["why"]
    assert why.startswith("client 0: its state-dir/")
    assert "000000-000001.safetensors cannot be read" in why
    assert str(tmp_path) not in why


@pytest.mark.parametrize("kind", SPOILT)
def test_a_bad_update_is_refused_by_name_and_the_round_goes_on(kind: str, plan: Compose) -> None:
    spoil, expected = SPOILT[kind]

    def worsen(message: Message, context: Context, reply: Message) -> Message:
        return spoil(reply) if at_round(message) == 1 and context.node_config["partition-id"] == 1 else reply

    rundir = run_on(Link(configs(3), worsen), plan(*FORGIVING, "federation.max_change=100"))
    (row,) = rundir.rows("failures.jsonl")
    assert (row["round"], row["client"]) == (1, 1)
    assert row["why"].startswith("client 1 ")
    assert expected in row["why"]
    assert [(r["clients"], r["failures"]) for r in rundir.rows()] == [(2, 1), (3, 0)]
    same_in_one_process(rundir, plan)


def test_a_spoilt_update_is_refused_where_only_a_mean_is_shown(plan: Compose) -> None:
    def worsen(message: Message, context: Context, reply: Message) -> Message:
        if at_round(message) == 1 and context.node_config["partition-id"] == 1:
            return swap(reply, **{KEY: Array(value(reply, KEY)[:1])})
        return reply

    mean = ("aggregation=mean", "federation.tolerate=1")
    rundir = run_on(Link(configs(3), worsen), plan(*mean))
    assert failures(rundir) == [(1, 1)]
    assert [(row["clients"], row["failures"]) for row in rundir.rows()] == [(2, 1), (3, 0)]
    same_in_one_process(rundir, plan, *mean)


def test_late_and_old_replies_are_not_merged(plan: Compose) -> None:
    """A reply that comes after its round, again, or to nobody's question counts for nothing."""
    held: list[Message] = []

    class Slow(Link):
        def pull_messages(self, message_ids: Any) -> Any:
            if any(sent.metadata.message_type == "train" and at_round(sent) == 2 for sent in self.sent):
                yield from held  # late, and with every pull anew
            yield from super().pull_messages(message_ids)

    def delay(message: Message, context: Context, reply: Message) -> Message | None:
        if at_round(message) == 1 and context.node_config["partition-id"] == 0:
            held.append(swap(reply, **{KEY: Array(value(reply, KEY) + 9)}))
            return None
        return reply

    slow = Slow(configs(3), delay)
    rundir = run_on(slow, plan(*FORGIVING, "federation.timeout_s=0.4", "federation.rounds=3"))
    assert len(held) == 1
    assert rundir.rows("failures.jsonl") == [
        {"round": 1, "client": 0, "why": "client 0 did not reply in time", "asked": True}
    ]
    same_in_one_process(rundir, plan, "federation.rounds=3")
    # An instruction outlives its round by no more than the clocks of nodes may differ (Flower lets them by 305 s).
    assert {message.metadata.ttl for message in slow.sent} == {0.4 + 330}


def test_nodes_that_come_late_leave_and_return(plan: Compose) -> None:
    link: Link

    def leave(message: Message, context: Context, reply: Message) -> Message:
        client, at = context.node_config["partition-id"], at_round(message)
        if (at, client) == (1, 2):
            link.online.discard(context.node_id)  # the SuperLink has noticed that it is gone
        if (at, client) == (2, 1):
            link.start({"partition-id": 2})  # without a key of its own a restarted node is another one
        return reply

    link = Link(configs(3), leave)
    rundir = run_on(link, plan(*FORGIVING, "federation.rounds=3"))
    assert rundir.rows("failures.jsonl") == [{"round": 2, "client": 2, "why": "client 2 has no node", "asked": False}]
    assert [row["clients"] for row in rundir.rows()] == [3, 2, 3]
    same_in_one_process(rundir, plan, "federation.rounds=3")


def test_a_round_waits_for_as_many_nodes_as_it_needs(plan: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    link = Link(configs(3))
    away, looks = sorted(link.nodes)[0], 0
    genuine = link.get_node_ids

    def looked() -> Any:
        nonlocal looks
        looks += 1
        if looks == 2:  # as round 1 is about to begin
            link.online.discard(away)
        if looks == 5:
            link.online.add(away)
        return genuine()

    monkeypatch.setattr(link, "get_node_ids", looked)
    rundir = run_on(link, plan())  # nothing is forgiven: all three are needed
    assert looks >= 6
    assert [row["clients"] for row in rundir.rows()] == [3, 3]
    link.online.discard(away)
    monkeypatch.setattr(link, "get_node_ids", genuine)
    with pytest.raises(ProtocolError, match=r"1 of 3 clients have no node .*federation.clients"):
        run_on(link, plan("federation.timeout_s=0.2", name="missing"))


def test_two_nodes_of_one_client_are_refused(plan: Compose) -> None:
    link = Link([*configs(3), {"partition-id": 1}])
    with pytest.raises(ProtocolError, match="2 nodes say that they are client 1: give each a partition-id of its own"):
        run_on(link, plan())


class _Stop(Exception):  # noqa: N818  # stands in for a kill of the server
    pass


def kill_server(link: Link, chosen: Plan, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients have trained in round `at`, and the server dies before it has written anything of it."""

    def dying(*_: Any, **__: Any) -> None:
        raise _Stop

    genuine = server._round

    def begin(run: Any, strategy: Any, number: int, *rest: Any) -> Any:
        if number == at:
            monkeypatch.setattr(RunDirectory, "log", dying)
        return genuine(run, strategy, number, *rest)

    with monkeypatch.context() as patch, pytest.raises(_Stop):
        patch.setattr(server, "_round", begin)
        run_on(link, chosen)
    monkeypatch.undo()


def test_a_killed_server_goes_on_where_it_was(plan: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = Link(configs(3, **{"state-dir": str(tmp_path / "node")}))
    kill_server(link, plan(*TEACHER, name="killed"), 2, monkeypatch)
    link.restart_all()  # a new run of Flower's begins with empty contexts
    resumed = run_on(link, plan(*TEACHER, name="killed"))
    assert_same(final_arrays(resumed), final_arrays(execute(plan(*TEACHER, name="straight"))))
    forgetful = Link(configs(3))
    kill_server(forgetful, plan(*TEACHER, name="memory"), 3, monkeypatch)
    forgetful.restart_all()
    with pytest.raises(ResumeError, match="node of client 0 has forgotten it: give nodes a state-dir"):
        run_on(forgetful, plan(*TEACHER, name="memory"))


def ledgers(folder: Path, clients: int) -> list[list[tuple[int, int, int]]]:
    found = []
    for client in range(clients):
        path = state_files.newest(folder, client, 99)
        assert path is not None
        entries = Ledger.read(state_files.read(path).ledger).entries
        found.append([(entry.round, entry.attempt, entry.count) for entry in entries])
    return found


def test_no_privacy_budget_is_forgotten_or_spent_twice(
    plan: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Server and nodes are killed: what was begun is paid once, by every node, whether or not it counts."""
    private = ("privacy=example", "privacy.noise_multiplier=2.0", "privacy.epsilon=null", "privacy.sample_rate=0.2")
    options = (*private, "method=byol", "method.norm=group", "federation.rounds=3")
    folder = tmp_path / "node"
    link = Link(configs(3, **{"state-dir": str(folder)}))
    kill_server(link, plan(*options, name="killed"), 2, monkeypatch)
    link.restart_all()
    resumed = run_on(link, plan(*options, name="killed"))
    straight = execute(plan(*options, name="straight"))
    ours, theirs = ledgers(folder / resumed.identity(), 3), ledgers(straight.clients, 3)
    for mine, other in zip(ours, theirs, strict=True):
        steps = other[0][2]
        assert other == [(at, 1, steps) for at in (1, 2, 3)]
        assert sorted(mine) == [(1, 1, steps), (2, 1, steps), (2, 2, steps), (3, 1, steps)]
    assert resumed.read("privacy.json")["epsilon"] > straight.read("privacy.json")["epsilon"]


def test_what_a_lost_reply_may_have_told_is_paid(plan: Compose, tmp_path: Path) -> None:
    """Client 1's last reply and client 2's only ones come to nothing: their steps are in the claim all the same."""
    private = ("privacy=example", "privacy.noise_multiplier=2.0", "privacy.epsilon=null", "privacy.sample_rate=0.2")
    options = (*private, "method=byol", "method.norm=group", "federation.rounds=3")

    def lose(message: Message, context: Context, reply: Message) -> Message:
        client, at = context.node_config["partition-id"], at_round(message)
        spoilt = client == 2 or (client, at) == (1, 3)
        return swap(reply, **{KEY: Array(value(reply, KEY) * np.nan)}) if spoilt else reply

    nodes = configs(3, **{"state-dir": str(tmp_path / "node")})
    lossy = run_on(Link(nodes, lose), plan(*options, *FORGIVING, name="lossy"))
    straight = run_on(Link(nodes), plan(*options, name="straight"))
    assert [row["client"] for row in lossy.rows("clients.jsonl")] == [0, 1, 0, 1, 0]
    claims = [run.read("privacy.json") for run in (lossy, straight)]
    assert claims[0]["epsilon"] == pytest.approx(claims[1]["epsilon"], rel=1e-9)
    assert claims[0]["data_sets"] == claims[1]["data_sets"] == 3
    rows = [{"client": 0, "round": 1, "spent": 5, "noise_multiplier": 1.0, "sample_rate": 0.1}]
    lost = [{"client": 1, "round": 1}, {"client": 0, "round": 2}, {"client": 2, "round": 1, "asked": False}]
    assert {c: r.count for c, r in statement.with_lost(rows, lost).items()} == {0: 10, 1: 5}
    assert {c: r.count for c, r in statement.with_lost(rows, [{"client": 0, "round": 1}]).items()} == {0: 5}
    assert statement.with_lost([], lost) == {}


def test_a_full_disk_on_a_node_is_the_nodes_failure(
    plan: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = str(tmp_path / "node1")
    _fill(full, monkeypatch)
    nodes = [{"partition-id": c, "state-dir": str(tmp_path / f"node{c}")} for c in range(3)]
    rundir = run_on(Link(nodes), plan(*TEACHER, *FORGIVING))
    assert failures(rundir) == [(at, 1) for at in (1, 2, 3)]
    why = rundir.rows("failures.jsonl")[0]["why"]
    place = f"its state-dir/{rundir.identity()}/000001-000001.safetensors"
    assert why == f"client 1: {place} cannot be written (No space left on device): free space"
    assert not list((tmp_path / "node1").rglob("*.*")), "nothing half written is left"
    same_in_one_process(rundir, plan, *TEACHER)


def test_a_full_disk_on_the_server_loses_no_round(
    plan: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = Link(configs(3, **{"state-dir": str(tmp_path / "node")}))
    with monkeypatch.context() as patch:
        _fill("000002/.server", patch)
        with pytest.raises(ConfigError, match=r"cannot be written \(No space left on device\): free space"):
            run_on(link, plan(*TEACHER, name="full"))
    rundir = run_on(link, plan(*TEACHER, name="full"))
    assert [row["round"] for row in rundir.rows()] == [1, 2, 3]
    assert_same(final_arrays(rundir), final_arrays(execute(plan(*TEACHER, name="straight"))))


def test_attempts_behind_a_line_that_a_full_disk_cut_off_are_counted(
    plan: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a private run: noise that one of them has drawn is not drawn again."""
    rundir = plan().open()
    assert rundir.attempt(1) == 1
    with (rundir.path / "attempts.jsonl").open("a") as file:
        file.write('{"rou')
    rundir.resumed(0)
    assert (rundir.attempt(1), rundir.attempt(1), rundir.lost()) == (2, 3, [(1, 1)])
    with monkeypatch.context() as patch:
        _fill("attempts.jsonl", patch)
        with pytest.raises(ConfigError, match=r"attempts.jsonl cannot be written \(No space left on device\): free"):
            rundir.attempt(2)
    assert rundir.attempts() == [1, 1, 1]


def _fill(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No byte reaches the disk below a place."""
    genuine = os.fsync

    def fsync(handle: int) -> None:
        if place in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        genuine(handle)

    monkeypatch.setattr(os, "fsync", fsync)


def test_two_runs_at_once_do_not_meet(plan: Compose, tmp_path: Path) -> None:
    nodes = configs(3, **{"state-dir": str(tmp_path / "node")})
    other: list[RunDirectory] = []

    def interfere(message: Message, context: Context, reply: Message) -> Message:
        if at_round(message) == 2 and not other:  # in the middle of a round; Flower gives each run contexts of its own
            other.append(run_on(Link(nodes), plan(*TEACHER, "seed=1", name="second")))
        return reply

    first = run_on(Link(nodes, interfere), plan(*TEACHER, name="first"))
    for seed, rundir in enumerate((first, *other)):
        assert_same(final_arrays(rundir), final_arrays(execute(plan(*TEACHER, f"seed={seed}", name=f"alone{seed}"))))
    assert len(list((tmp_path / "node").iterdir())) == 2
    with pytest.raises(ConfigError, match="is being written by another process"), first.lock():
        run_on(Link(nodes), plan(*TEACHER, name="first"))


# Nodes with data of their own.


@pytest.fixture
def sites(tmp_path: Path) -> list[str]:
    """Three places of unlabelled grey images, of different sizes."""
    rng, places = np.random.default_rng(0), []
    for client, count in enumerate((24, 16, 9)):
        places.append(str(tmp_path / f"secret-place-{client}.npz"))
        draw = lambda n: rng.integers(0, 255, (n, 8, 8), dtype=np.uint8)  # noqa: E731
        np.savez(places[-1], train_images=draw(count), test_images=draw(2))
    return places


OWN = ("data=npz", "data.path=", "data.augment.mean=[0.5]", "data.augment.std=[0.25]")
SITES = ("partition=sites", "partition.shape=[1,8,8]")


def own(plan: Compose, *options: str, name: str) -> Plan:
    """Without what a tiny run says of generated data."""
    from conftest import TINY

    from fedssl import config

    base = [o for o in TINY if not o.startswith(("data", "partition", "engine"))]
    return config.compose([*base, *OWN, *SITES, f"out={plan().path.parent}", f"name={name}", *options])


def test_nodes_train_on_data_that_only_they_can_name(plan: Compose, sites: list[str]) -> None:
    nodes = [{"partition-id": c, "data-dir": place} for c, place in enumerate(sites)]
    link = Link(nodes)
    deployed = run_on(link, own(plan, name="deployed"))
    rehearsed = execute(own(plan, f"engine.sites=[{','.join(sites)}]", name="rehearsed"))
    assert_same(final_arrays(deployed), final_arrays(rehearsed))
    assert [row["examples"] for row in deployed.rows("clients.jsonl")[:3]] == [24, 16, 9]
    assert deployed.read("manifest.json")["split"] == {}
    assert not (deployed.path / "split.json").exists()
    assert {entry["name"] for entry in deployed.read("payload.json")["up"]} >= {"num-examples", "steps", KEY}
    for message in link.sent:
        assert b"secret-place" not in repr(message.content).encode()
    for path in deployed.path.rglob("*"):
        assert path.is_dir() or b"secret-place" not in path.read_bytes(), path


def test_a_server_measures_on_data_of_its_own(plan: Compose, sites: list[str]) -> None:
    nodes = [{"partition-id": c, "data-dir": place} for c, place in enumerate(sites)]
    measuring = ("evaluate.every=1", "evaluate.final=true")
    rundir = run_on(Link(nodes), own(plan, *measuring, f"data.path={sites[0]}", name="measured"))
    assert all("rankme" in row for row in rundir.rows())
    blind = run_on(Link(nodes), own(plan, name="blind"))
    assert_same(final_arrays(rundir), final_arrays(blind))
    with pytest.raises(ConfigError, match="measures on the server, which has no data set: use evaluate.every=0"):
        run_on(Link(nodes), own(plan, *measuring, name="none"))


def test_bad_data_on_a_node_is_one_sentence(plan: Compose, sites: list[str], tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    np.savez(
        tmp_path / "wide.npz",
        x_train=rng.integers(0, 255, (9, 9, 9), dtype=np.uint8),
        x_test=np.zeros((2, 9, 9), np.uint8),
    )
    (tmp_path / "torn.npz").write_bytes(Path(sites[0]).read_bytes()[:99])
    good = {"partition-id": 0, "data-dir": sites[0]}
    bad: dict[str, dict[str, Any]] = {
        "this node's examples have the shape [1, 9, 9] and the run is for partition.shape=[1, 8, 8]": {
            "data-dir": str(tmp_path / "wide.npz")
        },
        "client 1: its data-dir cannot be read as a .npz file": {"data-dir": str(tmp_path / "torn.npz")},
        "client 1: There is no file its data-dir": {"data-dir": str(tmp_path / "absent.npz")},
        "this node has no data of its own and the run is for such nodes": {},
        "this node has timeseries and the run is for images": {"data-dir": sites[1], "modality": "timeseries"},
    }
    for number_, (sentence, config) in enumerate(bad.items()):
        link = Link([good, {"partition-id": 1, **config}])
        with pytest.raises(ProtocolError) as caught:
            run_on(link, own(plan, "federation.clients=2", name=f"bad{number_}"))
        assert sentence in str(caught.value)
        assert str(tmp_path) not in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(ProtocolError, match="trains on its own data-dir alone and the run names a common data set"):
        run_on(Link([good, {**good, "partition-id": 1}]), plan("federation.clients=2", name="common"))
    with pytest.raises(ConfigError, match="engine.sites names 1 places of data for 3 clients"):
        execute(own(plan, f"engine.sites=[{sites[0]}]", name="few"))
    with pytest.raises(ConfigError, match="partition.shape=7 is no shape of an example"):
        run_on(Link([good] * 3), own(plan, "partition.shape=7", name="shapeless"))
    with pytest.raises(ConfigError, match="baselines=true trains on the union"):
        execute(own(plan, "baselines=true", f"engine.sites=[{','.join(sites)}]", name="union"))
    with pytest.raises(ConfigError, match="is not read from one place"):
        run_on(Link([good] * 3), plan("partition=sites", "partition.shape=[3,8,8]", name="generated"))
    with pytest.raises(ConfigError, match="this node says partition-id=None: start it with --node-config"):
        site.client_of({})
