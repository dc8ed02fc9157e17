"""After the last round: final probes, baselines, the encoder's files, the claim of privacy and the summary."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from fedssl.client import FitResult
from fedssl.evaluation.baselines import central
from fedssl.export import save_encoder
from fedssl.flower.run.claims import claims
from fedssl.flower.run.running import Running
from fedssl.measures.alarms import Alarm
from fedssl.parts import Arrays


@dataclass
class Measured:
    """What was measured of the encoders after the last round, each by the name of its encoder."""

    probes: dict[str, dict[str, float]] = field(default_factory=dict)
    spectra: dict[str, list[float]] = field(default_factory=dict)
    final: dict[str, float] = field(default_factory=dict)  # of the merged model, as in `metrics.jsonl`
    alarms: list[Alarm] = field(default_factory=list)  # of the whole run


def finish(run: Running, initial: Arrays, now: Arrays) -> dict[str, Any]:
    """Final probes, baselines, the encoder's files and the summary; repeated if a kill interrupts it."""
    rundir, rows = run.rundir, run.rundir.rows()
    save_encoder(rundir.path, run.job, run.data.train.shape, initial | now)
    started = time.perf_counter()
    measured = _measured(run, initial | now, now, int(rows[-1]["round"]))
    claim = claims(run)
    rundir.write("privacy.json", claim)
    rundir.write("probes.json", {"probes": measured.probes, "spectra": measured.spectra})
    summary = _summary(rows, measured, claim, started)
    rundir.write("summary.json", summary)
    return summary


def _measured(run: Running, arrays: Arrays, merged: Arrays, last: int) -> Measured:
    """Measure the merged encoder, a random one, and one that was trained without a federation."""
    job, evaluator, found = run.job, run.evaluator, Measured()
    if len(run.data.test):  # else the data is on the nodes, and the server has none
        found.final, found.alarms = run.monitor.final(arrays, merged, last)
        found.spectra["federated"] = evaluator.spectrum(arrays)
    if job.evaluate.final and evaluator.labelled:
        run.reporter.say("measuring the encoder: linear and few-label probes")
        found.probes["federated"] = evaluator.probe(arrays)
        random = evaluator.random_encoder()
        found.probes["random encoder"] = evaluator.probe(random)
        found.spectra["random encoder"] = evaluator.spectrum(random)
    if job.baselines:
        whole = _central(run)
        found.spectra["central"] = evaluator.spectrum(whole)
        found.probes["central"] = evaluator.probe(whole)
        found.probes |= evaluator.without_encoder()
    return found


def _summary(
    rows: Sequence[Mapping[str, Any]], measured: Measured, claim: Mapping[str, Any], started: float
) -> dict[str, Any]:
    """The content of `summary.json`."""
    others = {name: values for name, values in measured.probes.items() if name != "federated"}
    summary = {
        "rounds": int(rows[-1]["round"]),
        "loss": next((row["loss"] for row in reversed(rows) if "loss" in row), None),  # None: nobody ever came
        **measured.final,
        **measured.probes.get("federated", {}),
        **{
            f"{name.replace(' ', '_')}_{key}": value
            for name, values in others.items()
            for key, value in values.items()
            if key.endswith("accuracy")
        },
        "epsilon": claim["epsilon"],
        "alarms": [asdict(alarm) for alarm in measured.alarms],
        "seconds": float(sum(row["seconds"] for row in rows)),
        "final_seconds": time.perf_counter() - started,
        "bytes_up": int(sum(row["bytes_up"] for row in rows)),
        "bytes_down": int(sum(row["bytes_down"] for row in rows)),
    }
    for key in ("knn_accuracy", "linear_accuracy", "random_encoder_linear_accuracy"):
        summary.setdefault(key, None)  # unlabelled data: nothing to measure them on
    return summary


def _central(run: Running) -> Arrays:
    """The central baseline, with its progress."""

    def tick(at: int, rounds: int, result: FitResult) -> None:
        if at == 1:
            run.reporter.begin("central baseline", 0, rounds)
        run.reporter.round(at, {"loss": result.loss})

    try:
        return central(run.job, run.data.train, run.device, tick)
    finally:
        run.reporter.end()
