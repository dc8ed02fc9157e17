"""Where and with what a run was made."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedssl import partition
from fedssl.errors import ConfigError
from fedssl.job.job import Job
from fedssl.job.shards import measured_skew


def manifest(job: Job, data: Any, parts: partition.Parts, device: torch.device) -> dict[str, Any]:
    """What `manifest.json` says.

    Raises:
        ConfigError: the version of fedssl cannot be told, because it was never installed.
    """
    commit = git_commit(Path(__file__).resolve().parents[2])
    return {
        "fedssl": _own_version(),
        **({"git_commit": commit} if commit else {}),
        "versions": {name: version(name) for name in ("torch", "flwr", "numpy", "scikit-learn")},
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch_threads": job.threads,
        "seed": job.seed,
        "job": job.fingerprint,
        "examples": {"train": len(data.train), "test": len(data.test)},
        "split": {} if isinstance(parts, partition.Elsewhere) else _split(job, data, parts, device),
    }


def _own_version() -> str:
    try:
        return version("fedssl")
    except PackageNotFoundError as error:
        raise ConfigError(
            "fedssl is not installed, only its folder is on the path, so the run could not say which version made it: "
            "pip install -e FOLDER"
        ) from error


def _split(job: Job, data: Any, parts: partition.Parts, device: torch.device) -> dict[str, Any]:
    return {
        "fingerprint": partition.fingerprint(parts),
        **partition.heterogeneity(parts, data.train.targets),
        **measured_skew(job, device),
    }


def git_commit(folder: Path) -> str | None:
    """The commit of a git checkout, read from its files; None outside one."""
    head = folder / ".git" / "HEAD"
    if not head.is_file():
        return None
    text = head.read_text(encoding="utf-8").strip()
    if not text.startswith("ref: "):
        return text
    ref = folder / ".git" / text.removeprefix("ref: ")
    if ref.is_file():
        return ref.read_text(encoding="utf-8").strip()
    packed = folder / ".git" / "packed-refs"
    for line in packed.read_text(encoding="utf-8").splitlines() if packed.is_file() else []:
        commit, _, name = line.partition(" ")
        if name == text.removeprefix("ref: "):
            return commit
    return None


def split_table(parts: partition.Parts, targets: np.ndarray | None, classes: Sequence[str]) -> dict[str, Any]:
    """The split for people: examples of each class on each client, or on every k-th, for split.json and its picture."""
    parts, every = partition.some_of(parts)
    told: dict[str, Any] = {"sizes": [len(rows) for rows in parts]} | ({"every": every} if every > 1 else {})
    if targets is None:
        return told
    counts = [np.bincount(targets[rows], minlength=len(classes)).tolist() for rows in parts]
    return {**told, "classes": list(classes), "counts": counts}
