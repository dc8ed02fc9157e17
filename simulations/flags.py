"""Hydra's flags, which `fedssl pretrain` takes beside key=value; a flag of another habit gets one sentence."""

from __future__ import annotations

from collections.abc import Sequence

from fedssl.errors import ConfigError

ALONE = ("-h", "--help", "--hydra-help", "--version", "--resolve", "-r", "--run", "-m", "--multirun",
         "--shell-completion", "-sc", "-i", "--info")  # fmt: skip
WITH_VALUE = ("-c", "--cfg", "-p", "--package", "-cp", "--config-path", "-cn", "--config-name", "-cd", "--config-dir",
              "--experimental-rerun")  # fmt: skip


def refuse_unknown(arguments: Sequence[str]) -> None:
    """Look at every word that begins with a hyphen.

    Raises:
        ConfigError: one is no flag of Hydra's.
    """
    for at, word in enumerate(arguments):
        name, equals, value = word.partition("=")
        if not word.startswith("-") or name in (*ALONE, *WITH_VALUE):
            continue
        given = value if equals else next(iter(arguments[at + 1 : at + 2]), "")
        key = name.lstrip("-").replace("-", "_")
        said = f"{key}={given}" if given and not given.startswith("-") else "federation.rounds=3"
        raise ConfigError(f"{name} is not an option of pretrain: options are written key=value, such as {said}")
