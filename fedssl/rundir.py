"""The run directory: the only place a run writes to, readable by people, resumable after any interruption."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fedssl.errors import ConfigError, FedsslError, ResumeError
from fedssl.files import finite, read_arrays, write_arrays, write_json, write_text
from fedssl.parts import Arrays
from fedssl.tree import flatten

NOT_THE_JOB = ("engine", "track", "name", "out")  # keys of a configuration that do not change what a run computes
LOGS = ("metrics.jsonl", "clients.jsonl", "collapse.jsonl", "failures.jsonl")
ATTEMPTS = "attempts.jsonl"  # of rounds of a private run
SECRET = "secret.json"  # from which cohorts follow that nobody else may know


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to go on after `round`, besides the clients' states."""

    round: int
    arrays: Arrays
    strategy: tuple[Arrays, dict[str, Any]]  # arrays and scalars of the strategy's own state
    past: Mapping[int, Arrays] = field(default_factory=dict)  # earlier models, by round, that stale turns began with
    aggregation: tuple[Arrays, Mapping[str, float]] = field(default_factory=lambda: ({}, {}))  # its memory


class RunDirectory:
    """One run's files.

    Every file but the logs is written to a temporary name and renamed. The logs are cut back to the last checkpoint
    when a run is resumed, so a row is in them once.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.clients = path / "checkpoints" / "clients"
        self.followers: list[Callable[[Mapping[str, Any]], None]] = []  # are told each row of metrics.jsonl
        self.new = False  # made by `open`, and no round has begun

    @classmethod
    def open(cls, path: Path, config: Mapping[str, Any]) -> RunDirectory:
        """Create the directory of a run, or open the one that this very configuration has begun.

        Raises:
            ConfigError: the directory belongs to another configuration or to something else.
        """
        run = cls(path)
        try:
            path.stat()
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError as error:
            raise ConfigError(f"{path} cannot be used ({error.strerror}): pass another name= or out=") from error
        if path.exists() and not path.is_dir():
            raise ConfigError(f"{path} is a file, not a run directory: pass another name= or out=")
        if path.exists() and any(p.suffix != ".tmp" for p in path.iterdir()) and not run.begun:
            raise ConfigError(f"{path} holds other files and no config.yaml: pass another name= or out=")
        if run.begun:
            difference = _difference(run.config(), config)
            if difference:
                raise ConfigError(
                    f"{path} belongs to a run of another configuration ({difference}): pass another name=, or delete it"
                )
        else:
            readable = "\x85" not in json.dumps(config, ensure_ascii=False)  # yaml writes it as the line break it is
            write_text(path / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=readable))
            run.new = True
        return run

    @contextmanager
    def or_nothing(self) -> Iterator[None]:
        """Take the directory away again if the run is refused before its first round: its name is free then."""
        try:
            yield
        except FedsslError:
            if self.new and not self.rounds and not self.rows():
                with suppress(ConfigError, OSError), self.lock():  # not from under another process, nor through a link
                    shutil.rmtree(self.path)
            raise

    @property
    def begun(self) -> bool:
        """Whether this is the directory of a run."""
        return (self.path / "config.yaml").exists()

    @property
    def done(self) -> bool:
        """Whether the run has ended well: its summary is written last."""
        return (self.path / "summary.json").exists()

    def config(self) -> dict[str, Any]:
        """The resolved configuration.

        Raises:
            ResumeError: there is none, or it is damaged.
        """
        try:
            tree = yaml.safe_load((self.path / "config.yaml").read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ResumeError(
                f"{self.path} is not a run directory: it has no config.yaml; pass the path of a run"
            ) from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ResumeError(f"{self.path}/config.yaml is damaged: start the run anew under another name") from error
        if not isinstance(tree, dict):
            raise ResumeError(f"{self.path}/config.yaml is damaged: start the run anew under another name")
        return tree

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Claim the directory for this process; a process that dies lets go of it.

        Raises:
            ConfigError: another process is running this very run.
        """
        with (self.path / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ConfigError(
                    f"{self.path} is being written by another process: wait for it, or pass another name="
                ) from error
            yield

    def log(
        self,
        row: Mapping[str, Any],
        clients: Sequence[Mapping[str, Any]],
        collapse: Sequence[Mapping[str, Any]] = (),
        failures: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Append one round to metrics.jsonl, its clients, what its parts give, and who failed, to the other logs.

        Raises:
            ConfigError: they cannot be written; what a resume finds is cut back to the last checkpoint.
        """
        for name, rows in zip(LOGS, ([row], clients, collapse, failures), strict=True):
            if not rows:
                continue
            try:
                with (self.path / name).open("a", encoding="utf-8") as file:
                    file.writelines(json.dumps(finite(r), allow_nan=False) + "\n" for r in rows)
            except OSError as error:
                raise ConfigError(
                    f"{self.path / name} cannot be written ({error.strerror}): free space, then `fedssl resume`"
                ) from error
        for tell in self.followers:
            tell(row)

    def attempt(self, at: int) -> int:
        """Note, before anybody trains, that a round begins; returns how often it has begun by now, at least 1.

        The note outlives a kill and is never cut back: what clients release in a round that is lost has been released.
        """
        self._note({"round": at})
        return self.attempts().count(at)

    def secret(self) -> int:
        """A number that only the server knows, the same for the whole run: 63 bits of the operating system."""
        path = self.path / SECRET
        if not path.exists():
            write_json(path, {"cohorts": int.from_bytes(os.urandom(8), "big") >> 1})
            path.chmod(0o600)
        return int(self.read(SECRET)["cohorts"])

    def identity(self) -> str:
        """A name of this very run, by which nodes keep what belongs to it: 16 hexadecimal digits, drawn once."""
        path = self.path / "identity.json"
        if not path.exists():
            write_json(path, {"run": os.urandom(8).hex()})
        return str(self.read("identity.json")["run"])

    def attempts(self) -> list[int]:
        """The rounds that have begun, in order, whatever became of them."""
        return [int(row["round"]) for row in self.rows(ATTEMPTS) if "round" in row]

    def resumed(self, done: int) -> None:
        """Note that the run goes on after round `done`: what had begun after it is lost."""
        if (self.path / ATTEMPTS).exists():
            self._note({"resumed after": done})

    def lost(self) -> list[tuple[int, int]]:
        """The rounds, with the number of the attempt, that had begun and are not part of the run."""
        begun: list[tuple[int, int]] = []
        lost: list[tuple[int, int]] = []
        counts: dict[int, int] = {}
        for row in self.rows(ATTEMPTS):
            if "round" in row:
                at = int(row["round"])
                counts[at] = counts.get(at, 0) + 1
                begun.append((at, counts[at]))
            else:
                done = int(row["resumed after"])
                lost += [each for each in begun if each[0] > done]
                begun = [each for each in begun if each[0] <= done]
        return lost

    def _note(self, row: Mapping[str, int]) -> None:
        """Write the log anew: behind a line that a full disk has cut off, nothing appended would be read."""
        rows = [*self.rows(ATTEMPTS), row]
        write_text(self.path / ATTEMPTS, "".join(json.dumps(each) + "\n" for each in rows))

    def rows(self, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
        """The rows of a log; a line cut off by a kill is left out."""
        path = self.path / name
        out = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            try:
                out.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return out

    def write(self, name: str, content: Mapping[str, Any]) -> None:
        """Write one JSON file of the run."""
        write_json(self.path / name, content)

    def read(self, name: str) -> dict[str, Any]:
        """Read one JSON file of the run.

        Raises:
            ResumeError: it is missing or damaged.
        """
        try:
            content = json.loads((self.path / name).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ResumeError(
                f"{self.path} has no {name}: the run has not ended; `fedssl resume {self.path}`"
            ) from error
        except ValueError as error:
            raise ResumeError(f"{self.path}/{name} is damaged: delete it and `fedssl resume {self.path}`") from error
        if not isinstance(content, dict):
            raise ResumeError(f"{self.path}/{name} is damaged: delete it and `fedssl resume {self.path}`")
        return content

    def checkpoint(self, point: Checkpoint) -> None:
        """Make a round resumable. It counts only once LATEST names it; the one before stays until then."""
        folder = self.path / "checkpoints" / f"{point.round:06d}"
        write_arrays(folder / "server.safetensors", point.arrays)
        arrays, scalars = point.strategy
        write_arrays(folder / "strategy.safetensors", arrays, {"scalars": json.dumps(scalars)})
        if point.past:
            past = {f"{at}/{key}": value for at, model in point.past.items() for key, value in model.items()}
            write_arrays(folder / "past.safetensors", past)
        arrays, numbers = point.aggregation
        if arrays or numbers:
            write_arrays(folder / "aggregation.safetensors", arrays, {"numbers": json.dumps(dict(numbers))})
        write_text(self.path / "checkpoints" / "LATEST", folder.name)
        for old in (self.path / "checkpoints").glob("[0-9]*"):
            if old.name != folder.name:
                shutil.rmtree(old)

    @property
    def rounds(self) -> int:
        """The round of the last checkpoint; 0 if there is none yet.

        Raises:
            ResumeError: what names it is damaged.
        """
        pointer = self.path / "checkpoints" / "LATEST"
        name = pointer.read_text(encoding="utf-8", errors="replace").strip() if pointer.exists() else "0"
        if not (name.isascii() and name.isdigit()):
            raise ResumeError(f"{pointer} is damaged: start the run anew under another name")
        return int(name)

    def latest(self) -> Checkpoint | None:
        """The last checkpoint, with all logs cut back to it; None if there is none yet.

        Raises:
            ResumeError: it is damaged.
        """
        done = self.rounds
        for log in LOGS:
            rows = [row for row in self.rows(log) if row["round"] <= done]
            write_text(self.path / log, "".join(json.dumps(row) + "\n" for row in rows))
        if not (self.path / "checkpoints" / "LATEST").exists():
            return None
        folder = self.path / "checkpoints" / f"{done:06d}"
        arrays, _ = read_arrays(folder / "server.safetensors")
        state, meta = read_arrays(folder / "strategy.safetensors")
        try:
            scalars = json.loads(meta["scalars"])
        except (KeyError, ValueError) as error:
            raise ResumeError(f"{folder} is damaged: start the run anew under another name") from error
        memory: tuple[Arrays, dict[str, float]] = ({}, {})
        if (folder / "aggregation.safetensors").exists():
            own, meta = read_arrays(folder / "aggregation.safetensors")
            memory = own, json.loads(meta["numbers"])
        past: dict[int, Arrays] = {}
        if (folder / "past.safetensors").exists():
            for key, value in read_arrays(folder / "past.safetensors")[0].items():
                past.setdefault(int(key.partition("/")[0]), {})[key.partition("/")[2]] = value
        return Checkpoint(done, arrays, (state, scalars), past, memory)


def _difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The first keys in which two configurations differ, with both values; empty if none."""
    a, b = ({k: v for k, v in flatten(_plain(t)) if k.partition(".")[0] not in NOT_THE_JOB} for t in (old, new))
    keys = [key for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)]
    shown = ", ".join(f"{key}: {a.get(key)} there, {b.get(key)} here" for key in keys[:3])
    return shown + (f", and {len(keys) - 3} more" if len(keys) > 3 else "")


def _plain(value: Any) -> Any:
    """What yaml gives back: tuples as lists."""
    return json.loads(json.dumps(value))
