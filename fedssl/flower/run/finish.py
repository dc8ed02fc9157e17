"""After the last round: final probes, baselines, the encoder's files, the claim of privacy and the summary."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from fedssl.client import FitResult
from fedssl.evaluation.baselines import central
from fedssl.export import save_encoder
from fedssl.flower.run.claims import claims
from fedssl.flower.run.running import Running
from fedssl.measures.alarms import Alarm
from fedssl.parts import Arrays


def finish(run: Running, initial: Arrays, now: Arrays) -> dict[str, Any]:
    """Final probes, baselines, the encoder's files and the summary; repeated if a kill interrupts it."""
    job, rundir, evaluator, arrays = run.job, run.rundir, run.evaluator, initial | now
    rows = rundir.rows()
    last = rows[-1]
    save_encoder(rundir.path, job, run.data.train.shape, arrays)
    started = time.perf_counter()
    probes: dict[str, dict[str, float]] = {}
    spectra: dict[str, list[float]] = {}
    final: dict[str, float] = {}
    alarms: list[Alarm] = []
    if len(run.data.test):  # else the data is on the nodes, and the server has none
        final, alarms = run.monitor.final(arrays, now, int(last["round"]))
        spectra["federated"] = evaluator.spectrum(arrays)
    if job.evaluate.final and evaluator.labelled:
        run.reporter.say("measuring the encoder: linear and few-label probes")
        probes["federated"] = evaluator.probe(arrays)
        random = evaluator.random_encoder()
        probes["random encoder"], spectra["random encoder"] = evaluator.probe(random), evaluator.spectrum(random)
    if job.baselines:
        whole = _central(run)
        spectra["central"] = evaluator.spectrum(whole)
        probes["central"] = evaluator.probe(whole)
        probes |= evaluator.without_encoder()
    claim = claims(run)
    rundir.write("privacy.json", claim)
    rundir.write("probes.json", {"probes": probes, "spectra": spectra})
    mine = probes.pop("federated", {})
    summary = {
        "rounds": int(last["round"]),
        "loss": next((row["loss"] for row in reversed(rows) if "loss" in row), None),  # None: nobody ever came
        **final,
        **mine,
        **{
            f"{name.replace(' ', '_')}_{key}": value
            for name, values in probes.items()
            for key, value in values.items()
            if key.endswith("accuracy")
        },
        "epsilon": claim["epsilon"],
        "alarms": [asdict(alarm) for alarm in alarms],
        "seconds": float(sum(row["seconds"] for row in rows)),
        "final_seconds": time.perf_counter() - started,
        "bytes_up": int(sum(row["bytes_up"] for row in rows)),
        "bytes_down": int(sum(row["bytes_down"] for row in rows)),
    }
    for key in ("knn_accuracy", "linear_accuracy", "random_encoder_linear_accuracy"):
        summary.setdefault(key, None)  # unlabelled data: nothing to measure them on
    rundir.write("summary.json", summary)
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
