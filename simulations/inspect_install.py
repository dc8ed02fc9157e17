"""`fedssl list` and `fedssl doctor`: what can be chosen, and what this machine can do."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from collections.abc import Sequence
from importlib.metadata import version

from fedssl import config
from fedssl.errors import ConfigError
from simulations.threads import advice

EXTRAS = {  # of pyproject.toml: what they install, and what for
    "ray": (("ray",), "engine=ray"),
    "hub": (("datasets",), "data=hub"),
    "onnx": (("onnx", "onnxscript", "onnxruntime"), "export --format onnx"),
    "sweep": (("hydra_plugins",), "hydra/launcher=joblib"),
    "track": (("tensorboard", "mlflow", "wandb"), "track=..."),
}
DAEMONS = ("flwr", "flower-superlink", "flower-supernode", "flower-superexec")
_PLURALS = {"strategies": "strategy", "privacies": "privacy", "studies": "study"}
_PLACES = {group: f"{group}@participation.{group}" for group in ("available", "pace")}  # they fill a field of another


def list_options(arguments: Sequence[str]) -> int:
    """Print every option of one configuration group, or of all, with its one-line description.

    Raises:
        ConfigError: there is no such group.
    """
    groups = [name for name in config.groups() if config.options_of(name)]
    if arguments:
        wanted = _PLURALS.get(arguments[0], arguments[0])
        wanted = wanted if wanted in groups else wanted.removesuffix("s")
        if wanted not in groups:
            raise ConfigError(f"{arguments[0]!r} is not a group: use one of {', '.join(groups)}")
        groups = [wanted]
    for group in groups:
        print(f"{group}:")
        for option in config.options_of(group):
            chosen = f"fedssl study {option}" if group == "study" else f"{_PLACES.get(group, group)}={option}"
            print(f"  {chosen:{len(_PLACES.get(group, group)) + 19}} {describe(group, option)}")
    return 0


def describe(group: str, option: str) -> str:
    """The first comment of an option's yaml file."""
    lines = (config.conf_dir() / group / f"{option}.yaml").read_text(encoding="utf-8").splitlines()
    return next((line.removeprefix("#").strip() for line in lines if line.startswith("# ") and "@" not in line), "")


def doctor(arguments: Sequence[str]) -> int:
    """Print versions, processors, GPUs, extras and free disk space, each with what follows from it."""
    if arguments:
        raise ConfigError("doctor takes no options")
    import torch

    packages = ("fedssl", "torch", "flwr", "opacus", "numpy", "hydra-core", "scikit-learn")
    print("python        " + platform.python_version())
    print("packages      " + ", ".join(f"{name} {version(name)}" for name in packages))
    cores = len(os.sched_getaffinity(0))
    print(f"processor     {cores} cores: engine=in_process runs {cores} clients at a time, each on threads=1")
    if cores > 1:
        print("small models  " + advice(cores, os.getloadavg()[0]))
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            print(f"gpu           cuda:{i} {p.name}, {p.total_memory / 2**30:.0f} GiB; device=auto uses cuda:0")
    else:
        print("gpu           none that torch can use; device=auto means cpu")
    for extra, (modules, use) in EXTRAS.items():
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        said = f"{', '.join(missing)} missing, for {use}: pip install 'fedssl[{extra}]'" if missing else "installed"
        print(f"extra {extra:7} {said}")
    absent = [name for name in DAEMONS if shutil.which(name) is None]
    print(
        "deployment    "
        + (
            f"{', '.join(absent)} not on PATH, by which Flower's programs start one another: put the environment's bin "
            "folder there"
            if absent
            else f"{', '.join(DAEMONS)} are on PATH"
        )
    )
    print(f"disk          {shutil.disk_usage('.').free / 2**30:.0f} GiB free here")
    print(f"configuration {config.conf_dir()}")
    return 0
