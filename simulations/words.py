"""The words after a command: `--name value` in any place and order, Hydra's flags, and the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedssl.errors import ConfigError

# Hydra's flags, which `pretrain` takes beside key=value
ALONE = ("-h", "--help", "--hydra-help", "--version", "--resolve", "-r", "--run", "-m", "--multirun",
         "--shell-completion", "-sc", "-i", "--info")  # fmt: skip
WITH_VALUE = ("-c", "--cfg", "-p", "--package", "-cp", "--config-path", "-cn", "--config-name", "-cd", "--config-dir",
              "--experimental-rerun")  # fmt: skip


@dataclass(frozen=True)
class Words:
    """What a command was given.

    Attributes:
        rest: words that belong to no option, in order.
        values: of each option that the command knows, those given, in order.
        usage: of the command, for refusals.
    """

    rest: Sequence[str]
    values: Mapping[str, Sequence[str]]
    usage: str

    def last(self, name: str, default: str = "") -> str:
        """The value of an option; where it is given again, the last one counts."""
        return self.values[name][-1] if self.values[name] else default

    def whole(self, name: str, default: int) -> int:
        """The value of an option that is a whole number of 0 or more.

        Raises:
            ConfigError: it is none.
        """
        word = self.last(name, str(default))
        if not (word.isascii() and word.isdigit()):
            raise ConfigError(f"--{name} needs a whole number and got {word}: {self.usage}")
        return int(word)


def read(arguments: Sequence[str], options: Sequence[str], usage: str) -> Words:
    """Tell a command's options from its other words.

    Args:
        arguments: after the command.
        options: the names of those that it knows, each of which takes a value.
        usage: the whole command, which begins with `fedssl NAME`.

    Raises:
        ConfigError: an unknown option, or one without a value or with an empty one.
    """
    values: dict[str, list[str]] = {name: [] for name in options}
    rest, left = list[str](), list(arguments)
    while left:
        word = left.pop(0)
        if not word.startswith("-"):
            rest.append(word)
            continue
        name = word.removeprefix("--")
        if not word.startswith("--") or name not in values:
            raise ConfigError(f"{word} is not an option of {usage.split()[1]}: {usage}")
        if not left or not left[0]:
            raise ConfigError(f"{word} needs a value: {usage}")
        values[name].append(left.pop(0))
    return Words(rest, values, usage)


def refuse_unknown(arguments: Sequence[str]) -> None:
    """Look at every word after `pretrain` that begins with a hyphen: a flag of another habit gets one sentence.

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
