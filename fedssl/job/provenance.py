"""Where and with what a run was made."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from fedssl import partition
from fedssl.errors import ConfigError
from fedssl.job.job import Job
from fedssl.job.shards import measured_skew
from fedssl.rundir import git_commit


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
