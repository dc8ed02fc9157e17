"""What Linux says about this process and its children: CPU time, memory, age; and about the machine."""

from __future__ import annotations

import os
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def family() -> list[list[str]]:
    """The fields of /proc/PID/stat, from the state on, of this process and all that descend from it."""
    every: dict[str, list[str]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            every[path.parent.name] = path.read_text().rpartition(")")[2].split()
    found, new = [], [str(os.getpid())]
    while new:
        found += [every[pid] for pid in new if pid in every]
        new = [pid for pid, fields in every.items() if fields[1] in new]
    return found


def cpu_s() -> float:
    """CPU seconds of the process tree so far."""
    return sum(int(n) for fields in family() for n in fields[11:15]) / os.sysconf("SC_CLK_TCK")


def memory_mib() -> float:
    """Resident memory of the process tree; pages that processes share count in each of them."""
    return sum(int(fields[21]) for fields in family()) * os.sysconf("SC_PAGE_SIZE") / 2**20


def age_s() -> float:
    """Seconds since this process was started."""
    started = int(family()[0][19]) / os.sysconf("SC_CLK_TCK")
    return float(Path("/proc/uptime").read_text().split()[0]) - started


@contextmanager
def watched_memory(every_s: float = 0.5) -> Iterator[list[tuple[float, float]]]:
    """Note the time and the memory of the process tree now and then, from a thread."""
    samples, ended = [(time.perf_counter(), memory_mib())], threading.Event()

    def watch() -> None:
        while not ended.wait(every_s):
            samples.append((time.perf_counter(), memory_mib()))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        ended.set()
        thread.join()


def machine(device: str = "cpu") -> dict[str, Any]:
    """What the measurements were made on, and with which GPU, if that is the device."""
    cpu = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    memory = [int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal")]
    versions = {"python": platform.python_version()}
    for name in ("torch", "flwr", "ray", "numpy"):
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    gpu = {} if device == "cpu" else {"gpu": torch.cuda.get_device_name(device)}
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "cpu": cpu[0] if cpu else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory[0] / 2**20, 1),
        "load_before": round(os.getloadavg()[0], 2),
        "versions": versions,
        **gpu,
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()
