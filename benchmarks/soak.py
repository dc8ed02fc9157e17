"""A deployment that is hurt while it runs: `python -m benchmarks.soak`.

A SuperLink and SuperNodes with data of their own, under TLS and with keys, on the loopback interface. Nodes that end
are begun again, as by systemd. After a quarter of the rounds a node is killed (kill -9); after half of them another
node's network is cut for a while; after three quarters the SuperLink is killed and restarted. At the end the arrays
must be, bit for bit, those of a simulation in which the same clients took part in each round.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import machine
from benchmarks.nodes import OPTIONS, Federation, Wire, federation, own_data, same_clients, simulated
from fedssl.files import write_json, write_text
from fedssl.flower.deploy.submit import submit
from fedssl.parts import Arrays
from fedssl.rundir import RunDirectory

RESULTS = Path(__file__).resolve().parent / "results" / "soak.json"
_PAUSE_S = 15.0  # before a node that has ended is begun again


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, compare and keep; 1 if the arrays differ or the run has not ended in time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=60.0, help="for the whole run; then it is given up")
    parser.add_argument("--cut", type=float, default=20.0, help="seconds without network")
    parser.add_argument("--deadline", type=float, default=300.0, help="federation.timeout_s")
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args(arguments)
    about = {"command": " ".join(["python -m benchmarks.soak", *(arguments or sys.argv[1:])]), "machine": machine()}
    with tempfile.TemporaryDirectory(prefix="fedssl-soak-") as folder, federation(Path(folder), chosen.nodes) as real:
        result = about | soak(real, chosen)
    write_json(chosen.out, result)
    write_text(chosen.out.with_suffix(".md"), told(result))
    print(told(result))
    return 0 if result["equal"] else 1


def soak(real: Federation, chosen: argparse.Namespace) -> dict[str, Any]:
    """One run with its faults, and its simulation."""
    folder, out = real.folder, real.folder / "runs"
    places = own_data(folder, chosen.nodes)
    real.superlink("process")
    real.superexec()
    real.register(chosen.nodes)
    wire = Wire(real.port)
    ports = {2: wire.port}
    started = {
        n: lambda n=n: real.node(f"node-{n}", n, places[n], folder / "keys" / f"node-{n}.key", None, ports.get(n, 0))
        for n in range(chosen.nodes)
    }
    for number, start in started.items():
        start()
        _supervise(real, f"node-{number}", start)
    options = (*OPTIONS, f"federation.clients={chosen.nodes}", f"federation.rounds={chosen.rounds}")
    told_of = [*options, f"federation.timeout_s={chosen.deadline}", "name=deployed"]
    os.environ.update(real.environment)
    began = time.monotonic()
    sent = submit(told_of, str(out), "edge")
    rundir, events = RunDirectory(out / "deployed"), list[dict[str, Any]]()

    def note(what: str) -> None:
        rows = rundir.rows()
        events.append({"after_round": int(rows[-1]["round"]) if rows else 0, "what": what, "at_s": _since(began)})
        print(f"{_since(began):7.1f} s, after round {events[-1]['after_round']}: {what}", flush=True)

    faults: list[tuple[int, Callable[[], None]]] = [
        (max(1, chosen.rounds // 4), lambda: _kill_node(real, note)),
        (max(2, chosen.rounds // 2), lambda: _cut(wire, chosen.cut, note)),
        (max(3, 3 * chosen.rounds // 4), lambda: _kill_superlink(real, note)),
    ]
    limit = began + 60 * chosen.minutes
    while time.monotonic() < limit and not rundir.done:
        done = len(rundir.rows())
        while faults and done >= faults[0][0]:
            faults.pop(0)[1]()
        time.sleep(0.5)
    seconds = _since(began)
    status = sent.wait(print, 2.0, 120.0)[0] if rundir.done else "given up"
    rows, clients = rundir.rows(), rundir.rows("clients.jsonl")
    result = {
        "nodes": chosen.nodes,
        "rounds": chosen.rounds,
        "seconds": seconds,
        "status": status,
        "events": events,
        "failures": rundir.rows("failures.jsonl"),
        "clients_a_round": [row["clients"] for row in rows],
        "seconds_a_round": [round(row["seconds"], 1) for row in rows],
        "turns": len(clients),
    }
    if not rundir.done:
        print(real.logs(), file=sys.stderr)
        return result | {"equal": False}
    again = simulated(rundir, places, options, *same_clients(rundir))
    hashes = [_digest(run) for run in (rundir, again)]
    return result | {"equal": hashes[0] == hashes[1], "sha256": hashes[0]}


def _since(began: float) -> float:
    return round(time.monotonic() - began, 1)


def _kill_node(real: Federation, note: Callable[[str], None]) -> None:
    os.killpg(real.processes["node-1"].pid, signal.SIGKILL)
    note("node 1 killed")


def _supervise(real: Federation, name: str, start: Callable[[], Any]) -> None:
    """Begin a node again whenever it ends, as systemd does: its key is refused until the old one is missed."""

    def watch() -> None:
        while name in real.processes:
            if real.processes[name].poll() is not None:
                time.sleep(_PAUSE_S)
                if name in real.processes:
                    start()
            time.sleep(0.5)

    threading.Thread(target=watch, daemon=True).start()


def _cut(wire: Wire, seconds: float, note: Callable[[str], None]) -> None:
    wire.cut()
    note("network of node 2 cut")

    def mend() -> None:
        time.sleep(seconds)
        wire.mend()
        note(f"network of node 2 mended after {seconds:g} s")

    threading.Thread(target=mend, daemon=True).start()


def _kill_superlink(real: Federation, note: Callable[[str], None]) -> None:
    real.kill("superlink")
    note("SuperLink killed")
    time.sleep(3)
    real.superlink("process")
    note("SuperLink is back")


def _digest(run: RunDirectory) -> str:
    point = run.latest()
    arrays: Arrays = {} if point is None else point.arrays
    digest = hashlib.sha256()
    for key, value in sorted(arrays.items()):
        digest.update(key.encode() + value.tobytes())
    return digest.hexdigest()


def told(result: dict[str, Any]) -> str:
    """The result for people."""
    about = result["machine"]
    lines = [
        "# A deployment with two kills and a cut\n",
        f"{about['date']}; {about['cpu']}, {about['cores']} cores, load before the start {about['load_before']}. "
        f"Command: `{result['command']}`.\n",
        f"{result['nodes']} SuperNodes with keys and data of their own under TLS, {result['rounds']} rounds in "
        f"{result['seconds']:.0f} s: {result['status']}. Final arrays equal to those of the simulation with the same "
        f"participation, bit for bit: **{'yes' if result['equal'] else 'no'}**.\n",
        "| seconds | after round | what |",
        "| --- | --- | --- |",
        *(f"| {e['at_s']} | {e['after_round']} | {e['what']} |" for e in result["events"]),
        "\n| round | clients | seconds | failed |",
        "| --- | --- | --- | --- |",
    ]
    rounds = zip(result["clients_a_round"], result["seconds_a_round"], strict=True)
    for at, (clients, seconds) in enumerate(rounds, 1):
        failed = "; ".join(row["why"] for row in result["failures"] if row["round"] == at)
        lines.append(f"| {at} | {clients} | {seconds} | {failed} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
