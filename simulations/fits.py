"""`fedssl fits`: whether a client's round fits into this machine's memory and time, measured before the first round."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf, isfinite

from fedssl import config
from fedssl.errors import ConfigError
from fedssl.flower.run.dry import KilledError, Turn, measure
from fedssl.job import Job
from fedssl.sites import Sites
from simulations.words import read

USAGE = "fedssl fits [--memory 4GiB] [--seconds 60] [--data-dir PLACE] [key=value ...]"
_UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "kB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True)
class Asked:
    """What a round may take."""

    overrides: tuple[str, ...]
    memory: float = inf  # bytes
    seconds: float = inf
    data_dir: str = ""  # of a node with data of its own

    @classmethod
    def of(cls, arguments: Sequence[str]) -> Asked:
        """Read the words after `fedssl fits`.

        Raises:
            ConfigError: an unknown option, or one without a limit above 0.
        """
        words = read(arguments, ("memory", "seconds", "data-dir"), USAGE)
        limits = {"memory": inf, "seconds": inf}
        for name, read_as, example in (("memory", size_of, "4GiB or 512MiB"), ("seconds", _number, "60")):
            if given := words.last(name):
                limits[name] = read_as(given)
                if not (limits[name] > 0 and isfinite(limits[name])):
                    raise ConfigError(f"--{name} needs a limit such as {example} and got {given}: {USAGE}")
        return cls(tuple(words.rest), **limits, data_dir=words.last("data-dir"))

    def holds(self, turn: Turn) -> bool:
        """Whether a round stays within both limits."""
        return turn.memory <= self.memory and turn.seconds <= self.seconds


def main(arguments: Sequence[str]) -> int:
    """Print what a round takes and whether it fits; 0: it does, 1: it does not.

    Raises:
        ConfigError: a wrong option or override, or a job that its client refuses.
    """
    asked = Asked.of(arguments)
    job = config.compose(asked.overrides).job
    if isinstance(job.partition, Sites) and not asked.data_dir:
        raise ConfigError("partition=sites is for nodes with data of their own: say whose with --data-dir PLACE")
    try:
        turn = measure(job.tree, asked.data_dir)
    except KilledError as error:
        print(f"memory   no: {error}")
        turn = None
    if turn is not None:
        print(*lines(turn, asked), sep="\n")
        if asked.holds(turn):
            return 0
    if turn is None or turn.memory > asked.memory:
        print(remedy(job, asked, turn))
    return 1


def lines(turn: Turn, asked: Asked) -> Iterator[str]:
    """One each for memory, seconds and bytes."""
    where = "of the GPU" if turn.gpu else "of the process"
    within = _verdict(turn.memory <= asked.memory, asked.memory)
    limit = f", limit {size(asked.memory)}" if isfinite(asked.memory) else ""
    yield f"memory   {within}{size(turn.memory)} {where}, {size(turn.before)} before the first step{limit}"
    within = _verdict(turn.seconds <= asked.seconds, asked.seconds)
    parts = f"{turn.steps} steps of {turn.step_seconds:.3g} s, {turn.other_seconds:.3g} s besides"
    limit = f", limit {asked.seconds:g} s" if isfinite(asked.seconds) else ""
    yield f"seconds  {within}{turn.seconds:.3g} a round ({parts}){limit}"
    if turn.seconds > asked.seconds:
        yield (
            f"         time-budget={asked.seconds:g} in the node's config stops it after "
            f"{turn.steps_in(asked.seconds)} of {turn.steps} steps; local.epochs=1 has the fewest"
        )
    yield (
        f"bytes    {turn.arrays_down:,} down and {turn.arrays_up:,} up a round, "
        f"{turn.wire_down:,} and {turn.wire_up:,} with headers"
    )
    whose = "this node's data" if asked.data_dir else f"client {turn.client}, which has most examples"
    yield f"measured {whose} ({turn.examples:,})"


def remedy(job: Job, asked: Asked, turn: Turn | None) -> str:
    """Options with which the memory suffices, found by measuring them one after another, or that none was found."""
    tried = []
    for options in remedies(job):
        try:
            found = measure(config.compose([*asked.overrides, *options]).job.tree, asked.data_dir)
        except (ConfigError, KilledError):  # this job, or this machine, cannot have it
            continue
        if found.memory <= asked.memory:
            return f"         {' '.join(options)} makes it {size(found.memory)} and {found.seconds:.3g} s a round"
        tried.append(f"{' '.join(options)} ({size(found.memory)})")
    floor = "" if turn is None else f"; {size(turn.before)} are taken before the first step"
    return (
        f"         no option makes it fit, of {', '.join(tried) or 'those that it takes'}{floor}: use a smaller encoder"
    )


def remedies(job: Job) -> Iterator[tuple[str, ...]]:
    """What takes less memory, from what changes nothing of the result to what does."""
    size = job.local.batch_size
    pieces = max(1, min(size, int(job.tree["privacy"].get("micro_batch") or size)) // 4)
    caching = f"privacy.micro_batch={pieces}"
    plain = not (job.privacy.private or job.local.compiled)  # whose blocks may run again
    if plain and not job.local.checkpointing:
        yield ("local.checkpointing=true",)
    if pieces < size:
        yield (caching,)
        if plain:
            yield ("local.checkpointing=true", caching)
    if job.local.precision != "bf16":
        yield ("local.precision=bf16",)
    for part in (2, 4):
        if size >= 2 * part:
            yield (f"local.batch_size={size // part}",)


def size_of(word: str) -> float:
    """Bytes of a word such as 4GiB; nan if it is none."""
    match = re.fullmatch(r"([0-9.]+) ?([A-Za-z]+)", word)
    return _number(match[1]) * _UNITS[match[2]] if match and match[2] in _UNITS else float("nan")


def size(count: float) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _number(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        return float("nan")


def _verdict(good: bool, limit: float) -> str:
    return "" if not isfinite(limit) else "yes: " if good else "no: "
