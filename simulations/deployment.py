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
from simulations.words import read

KEYS = "fedssl keys FOLDER [--nodes 2] [--host NAME_OR_ADDRESS ...] [--days 365]"
SUBMIT = "fedssl submit [CONNECTION] --out /absolute/folder/on/the/server [--every 5] [key=value ...]"


def keys(arguments: Sequence[str]) -> int:
    """Make the keys and certificates of a federation.

    Raises:
        ConfigError: not exactly one folder, which must not exist, or a bad option.
    """
    words = read(arguments, ("nodes", "host", "days"), KEYS)
    if len(words.rest) != 1:
        raise ConfigError(f"keys takes exactly one new folder and its options: {KEYS}")
    hosts = words.values["host"] or ["localhost", "127.0.0.1"]
    for path in deploy_keys.make(Path(words.rest[0]), words.whole("nodes", 2), hosts, words.whole("days", 365)):
        print(f"{path.stat().st_mode & 0o777:o} {path}")
    print(f"the server's certificate is for {', '.join(hosts)}; ca.key belongs on no machine of the federation")
    return 0


def submit(arguments: Sequence[str]) -> int:
    """Run a configuration on the nodes of a SuperLink and wait for its end; 1 if it fails there.

    Raises:
        FedsslError: a bad option, or a SuperLink that does not take the run.
    """
    words = read(arguments, ("out", "every"), SUBMIT)
    names = [word for word in words.rest if "=" not in word]
    overrides = [word for word in words.rest if "=" in word]
    if len(names) > 1 or not words.last("out"):
        raise ConfigError(f"submit takes one connection of config.toml, --out and a configuration: {SUBMIT}")
    plan = config.compose(overrides)  # refuses here what the server would
    out, reporter = words.last("out"), Reporter()
    sent = submission.submit(overrides, out, names[0] if names else "")
    reporter.say(f"run {sent.run} writes {out}/{plan.path.name} on the server; ctrl-C leaves it running")
    status, details = sent.wait(reporter.say, words.whole("every", 5))
    if status == "finished:completed":
        return 0
    print(
        f"error: run {sent.run} ended as {status} ({details}): `flwr log {sent.run} --show` has its log, as above; "
        "the same command goes on from its last checkpoint",
        file=sys.stderr,
    )
    return 1
