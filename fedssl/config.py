"""Hydra: from overrides to a plan. The only file of the library that knows it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedssl.build import build
from fedssl.errors import ConfigError
from fedssl.job import Job
from fedssl.rundir import NOT_THE_JOB, RunDirectory
from fedssl.tree import flatten

UNTRACKED = {"_target_": "fedssl.tracking.Untracked"}  # runs of before there were trackers


def conf_dir() -> Path:
    """Where the yaml files are: inside the installed package, or beside it in a checkout."""
    here = Path(__file__).resolve().parent
    for folder in (here / "conf", here.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise ConfigError(
        f"no conf/config.yaml in {here} or beside it: the installation is not complete, install fedssl again"
    )


@dataclass(frozen=True)
class Plan:
    """A job, the engine that runs it, where its directory goes, and the tracker that is told of it."""

    job: Job
    engine: Mapping[str, Any]
    path: Path  # the run directory
    track: Mapping[str, Any] = field(default_factory=UNTRACKED.copy)

    @classmethod
    def of(cls, tree: Mapping[str, Any]) -> Plan:
        """A plan from a resolved configuration, composed now or read from a run directory.

        Raises:
            ConfigError: a missing value, an unknown key or a wrong type.
        """
        for key, value in flatten(tree):
            if value == "???":
                raise ConfigError(f"{key} is missing: pass {key}=...")
        for key in ("engine", "name", "out"):
            if key not in tree:
                raise ConfigError(f"the configuration has no {key!r}: it was not written by this version of fedssl")
        if (name := Path(str(tree["name"] or ""))).is_absolute() or ".." in name.parts:
            raise ConfigError(f"name={name} leads out of out={tree['out']}: give a name, and another place by out=")
        job = Job({key: value for key, value in tree.items() if key not in NOT_THE_JOB})
        job.check()
        build(tree["engine"], "engine")
        track = tree.get("track", UNTRACKED)
        build(track, "track")
        return cls(job, tree["engine"], Path(str(tree["out"])) / str(tree["name"] or _name(tree, job)), track)

    def at(self, path: Path) -> Plan:
        """The same plan in another directory."""
        return replace(self, path=path)

    def open(self) -> RunDirectory:
        """Create or open the run directory."""
        place = {"name": self.path.name, "out": str(self.path.parent)}
        others = {"engine": dict(self.engine), "track": dict(self.track)}
        return RunDirectory.open(self.path, {**self.job.tree, **others, **place})

    def build_engine(self) -> Any:
        """The engine object."""
        return build(self.engine, "engine")

    def build_track(self) -> Any:
        """The tracker."""
        return build(self.track, "track")


def plan_from(config: DictConfig) -> Plan:
    """A plan from a composed configuration.

    Raises:
        ConfigError: a missing value, an unknown key or a wrong type.
    """
    try:
        tree = cast(dict[str, Any], OmegaConf.to_container(config, resolve=True, throw_on_missing=False))
    except OmegaConfBaseException as error:
        raise ConfigError(
            f"the configuration cannot be resolved: {_first_line(error)}; correct that override"
        ) from error
    return Plan.of(tree)


def _name(tree: Mapping[str, Any], job: Job) -> str:
    words = [str(tree[group]["_target_"]).rpartition(".")[2].lower() for group in ("method", "strategy", "data")]
    return "-".join([*words, f"seed{job.seed}", job.fingerprint])


def compose(overrides: Sequence[str]) -> Plan:
    """The plan that these Hydra overrides describe.

    Raises:
        ConfigError: in one sentence, for every wrong override.
    """
    try:
        with _hydra():
            config = hydra_compose("config", relax(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise explain(error, overrides) from error
    return plan_from(config)


@contextmanager
def _hydra() -> Iterator[None]:
    """Hydra for our configuration; what it was set up for before, in a notebook perhaps, it is afterwards."""
    before = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            yield
    finally:
        GlobalHydra.instance().hydra = before


def relax(overrides: Sequence[str]) -> list[str]:
    """Let `strategy.share.teacher=local` and `encoder@encoders.a=conv4` add keys that no yaml can list."""
    free = {"strategy.share": "++", "strategy.parts": "++", "encoder@encoders.": "+"}
    signs = [next((sign for start, sign in free.items() if text.startswith(start)), "") for text in overrides]
    return [sign + text for sign, text in zip(signs, overrides, strict=True)]


def explain(error: Exception, overrides: Sequence[str]) -> ConfigError:
    """One sentence for an error of Hydra on these overrides, with the nearest option that exists."""
    text = str(error)
    if match := re.search(r"Ambiguous value for argument '([^']+)'", text):
        return ConfigError(
            f"{match[1]} holds several values where a run takes one: `fedssl pretrain -m` runs each, [a,b] is a list"
        )
    if match := re.search(r"Could not override '(hydra\.[^']+)'", text):
        return ConfigError(
            f"{match[1]} is not an option here: `fedssl pretrain --cfg hydra` shows those of Hydra; a launcher's come "
            "with it, as with hydra/launcher=joblib"
        )
    if match := re.search(r"Could not override '([^']+)'", text):
        key = match[1]
        known = _known_keys(overrides)
        moved = [other for other in known if other.rpartition(".")[2] == key.rpartition(".")[2]]
        near = moved[:1] or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else "`fedssl pretrain --cfg job` shows all options"
        return ConfigError(f"{key} is not an option here: {hint}")
    if match := re.search(r"Could not find '([^'/]+)/([^']*)'", text):
        group, choice = match[1], match[2]
        options = options_of(group)
        near = difflib.get_close_matches(choice, options, n=1)
        hint = f"did you mean {group}={near[0]}?" if near else f"choose one of {', '.join(options)}"
        return ConfigError(f"{group}={choice} does not exist: {hint}")
    return ConfigError(f"the overrides cannot be read: {_first_line(error)}; write them as key=value")


def options_of(group: str) -> list[str]:
    """The yaml names of a configuration group, sorted."""
    return sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))


def groups() -> list[str]:
    """The configuration groups, sorted."""
    return sorted(path.name for path in conf_dir().iterdir() if path.is_dir())


def _known_keys(overrides: Sequence[str]) -> list[str]:
    """The keys of the configuration with the groups that these overrides choose."""
    chosen = [text for text in overrides if text.partition("=")[0] in groups()]
    with _hydra():
        tree = OmegaConf.to_container(hydra_compose("config", chosen), resolve=False)
    leaves = [key for key, _ in flatten(cast(dict[str, object], tree))]
    parents = {key.rpartition(".")[0] for key in leaves if "." in key}
    return list(dict.fromkeys([*leaves, *sorted(parents), *groups()]))  # a group may choose nothing, as `experiment`


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
