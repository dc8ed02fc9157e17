"""The command as a whole Hydra application: sweeps, `--cfg job`, `--help`, options of Hydra itself."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

import hydra
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from fedssl import config
from fedssl.errors import ConfigError

_LAUNCHER = "hydra/launcher"


def application(task: Callable[[DictConfig], None], arguments: Sequence[str]) -> None:
    """Let Hydra run a task as these arguments say.

    Raises:
        FedsslError: what the task refuses, or, in one sentence, what Hydra does.
    """
    before = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing, so that `explain` can speak
    sys.argv = ["fedssl pretrain", *config.relax(arguments)]
    try:
        hydra.main(config_path=str(config.conf_dir()), config_name="config", version_base="1.3")(task)()
    except (HydraException, OmegaConfBaseException) as error:
        raise _missing(error) or config.explain(error, arguments) from error
    except ValueError as error:
        if not str(error).startswith("Only one of --"):
            raise
        raise ConfigError(f"{str(error).rstrip('.')}, since each does something else: leave the others out") from error
    finally:
        sys.argv = before[0]
        if before[1] is None:
            del os.environ["HYDRA_FULL_ERROR"]


def _missing(error: Exception) -> ConfigError | None:
    """For a launcher that no installed package brings."""
    name = error.missing_cfg_file if isinstance(error, MissingConfigException) else None
    if not isinstance(name, str) or not name.startswith(f"{_LAUNCHER}/"):
        return None
    name = name.removeprefix(f"{_LAUNCHER}/")
    extra = "fedssl[sweep]" if name == "joblib" else f"hydra-{name}-launcher"
    return ConfigError(
        f"{_LAUNCHER}={name} is not installed: pip install '{extra}', or leave it out, and cells run one by one"
    )
