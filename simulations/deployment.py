"""`fedssl keys` and `fedssl submit`: federations of real machines."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from fedssl import config
from fedssl.errors import ConfigError
from fedssl.flower.deploy import keys as deploy_keys
from fedssl.flower.deploy import submit as submission
from fedssl.progress import Reporter

KEYS = "fedssl keys FOLDER [--nodes 2] [--host NAME_OR_ADDRESS ...] [--days 365]"
SUBMIT = "fedssl submit [CONNECTION] --out /absolute/folder/on/the/server [--every 5] [key=value ...]"


def keys(arguments: Sequence[str]) -> int:
    """Make the keys and certificates of a federation.

    Raises:
        ConfigError: not exactly one folder, which must not exist, or a bad option.
    """
    words, options = _read(arguments, ("nodes", "host", "days"), KEYS)
    if len(words) != 1:
        raise ConfigError(f"keys takes exactly one new folder and its options: {KEYS}")
    hosts = options["host"] or ["localhost", "127.0.0.1"]
    numbers = [_whole(options[name], default, name) for name, default in (("nodes", 2), ("days", 365))]
    for path in deploy_keys.make(Path(words[0]), numbers[0], hosts, numbers[1]):
        print(f"{path.stat().st_mode & 0o777:o} {path}")
    print(f"the server's certificate is for {', '.join(hosts)}; ca.key belongs on no machine of the federation")
    return 0


def submit(arguments: Sequence[str]) -> int:
    """Run a configuration on the nodes of a SuperLink and wait for its end; 1 if it fails there.

    Raises:
        FedsslError: a bad option, or a SuperLink that does not take the run.
    """
    words, options = _read(arguments, ("out", "every"), SUBMIT)
    names = [word for word in words if "=" not in word]
    overrides = [word for word in words if "=" in word]
    if len(names) > 1 or not options["out"]:
        raise ConfigError(f"submit takes one connection of config.toml, --out and a configuration: {SUBMIT}")
    plan = config.compose(overrides)  # refuses here what the server would
    out, reporter = options["out"][-1], Reporter()
    sent = submission.submit(overrides, out, names[0] if names else "")
    reporter.say(f"run {sent.run} writes {out}/{plan.path.name} on the server; ctrl-C leaves it running")
    status, details = sent.wait(reporter.say, _whole(options["every"], 5, "every"))
    if status == "finished:completed":
        return 0
    print(
        f"error: run {sent.run} ended as {status} ({details}): `flwr log {sent.run} --show` has its log, as above; "
        "the same command goes on from its last checkpoint",
        file=sys.stderr,
    )
    return 1


def _read(arguments: Sequence[str], known: Sequence[str], usage: str) -> tuple[list[str], dict[str, list[str]]]:
    """Words and options `--name value`, which may be repeated."""
    options: dict[str, list[str]] = {name: [] for name in known}
    words, rest = [], list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            words.append(word)
            continue
        name = word.removeprefix("--")
        if name not in options or not rest:
            raise ConfigError(f"{word} is {'not an option' if name not in options else 'without a value'}: {usage}")
        options[name].append(rest.pop(0))
    return words, options


def _whole(given: Sequence[str], default: int, name: str) -> int:
    word = given[-1] if given else str(default)
    if not (word.isascii() and word.isdigit()):
        raise ConfigError(f"--{name} needs a whole number and got {word!r}")
    return int(word)
