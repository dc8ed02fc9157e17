"""Shared by all tests: one torch thread, and tiny runs."""

from __future__ import annotations

import copy
import gc
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedssl import config
from fedssl.config import Plan
from fedssl.parts import Arrays
from fedssl.progress import Reporter
from fedssl.rundir import RunDirectory

ROOT = Path(__file__).resolve().parent.parent


def _composed_once() -> None:
    """Compose equal options once, and read each yaml file once.

    Hydra takes a fifth of a second for what contract suites ask for thousands of times. A choice whose yaml has no
    defaults of its own takes its group's place in what Hydra composes without it; what Hydra refuses, it refuses
    itself. test_config.py compares. A plan is never changed by those who use it.
    """
    genuine, hydras = config.compose, config.hydra_compose

    @cache
    def composed(folder: Path, overrides: tuple[str, ...]) -> Plan:
        return genuine(overrides)

    @cache
    def base(folder: Path, name: str, choices: tuple[str, ...]) -> DictConfig:
        return hydras(name, list(choices))

    @cache
    def node(path: Path) -> DictConfig | None:
        text = path.read_text() if path.is_file() else "defaults:"
        return None if "defaults:" in text or "@package" in text else OmegaConf.create(text)

    def quick(name: str, overrides: Sequence[str]) -> DictConfig:
        folder, groups = config.conf_dir(), config.groups()
        keys = {text: text.partition("=")[0].lstrip("+~") for text in overrides}
        choices = [text for text in overrides if keys[text].partition("@")[0] in groups]
        nodes = {keys[text]: node(folder / (text.replace("=", "/", 1) + ".yaml")) for text in choices}
        others = tuple(text for text in choices if nodes[keys[text]] is None)
        try:
            values = OverridesParser.create().parse_overrides([text for text in overrides if text not in choices])
            if len(nodes) == len(choices) and not any(value.is_sweep_override() for value in values):
                tree = copy.deepcopy(base(folder, name, others))
                tree.update({group: content for group, content in nodes.items() if content is not None})
                ConfigLoaderImpl._apply_overrides_to_config(values, tree)
                return tree
        except (HydraException, OmegaConfBaseException):
            pass
        return hydras(name, list(overrides))

    quick.genuine = hydras  # type: ignore[attr-defined]
    config.hydra_compose = quick
    config.compose = lambda overrides: composed(config.conf_dir(), tuple(overrides))


_composed_once()


SLOW = (  # whole files of `make test-all`: studies, attacks and measurements, whose runs take minutes together
    *("test_attackers", "test_audit_attacks", "test_audit_runs", "test_benchmarks"),
    *("test_privacy_utility", "test_studies", "test_studies_c"),
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark them before pytest deselects what is slow."""
    for item in items:
        if item.path.stem in SLOW:
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """Thousands of collected tests need no look by the garbage collector, which Flower calls for every reply."""
    gc.collect()
    gc.freeze()


SMALL_DATA = ("data.train=60", "data.test=30", "data.classes=3")
MODALITIES = {  # each with features of 8 numbers
    "images": ("data=synthetic", *SMALL_DATA, "data.size=8", "encoder.width=4", "encoder.dim=8"),
    "timeseries": (
        *("data=synthetic_signals", *SMALL_DATA, "data.steps=32", "data.channels=2"),
        *("encoder.width=4", "encoder.dim=8"),
    ),
    "graphs": ("data=synthetic_graphs", *SMALL_DATA, "data.size=8", "encoder.width=4", "encoder.layers=2"),
    "pairs": (
        *("data=synthetic_pairs", *SMALL_DATA, "data.size=8"),
        *(f"encoder.{side}.{field}" for side in ("first", "second") for field in ("width=4", "dim=8")),
    ),
}
TINY = (
    *MODALITIES["images"],
    "method.hidden=16",
    "method.out=8",
    "local.batch_size=8",
    "federation.clients=3",
    "federation.rounds=2",
    "evaluate.every=0",
    "evaluate.final=false",
    "partition.alpha=1.0",
    "device=cpu",
    "engine.workers=2",
)


def fields_of(method: str) -> set[str]:
    """The options that a method's yaml lists."""
    text = (config.conf_dir() / "method" / f"{method}.yaml").read_text()
    return {line.partition(":")[0] for line in text.splitlines() if line[:1].isalpha()} | (
        {"base"} if "/method@base" in text else set()
    )


def tiny(*overrides: str, modality: str = "images") -> list[str]:
    """The options of a tiny run; overrides come last and win; what the chosen method does not have is left out."""
    overrides = (*(MODALITIES[modality] if modality != "images" else ()), *overrides)
    method = next((o.removeprefix("method=") for o in overrides if o.startswith("method=")), "simclr")
    chosen = {o.split("=")[0] for o in overrides}
    known = fields_of(method)
    given = TINY if modality == "images" else TINY[len(MODALITIES["images"]) :]
    base = [o for o in given if o.split("=")[0] not in chosen]
    if "base" in known:  # an option that a wrapper has not is its base's
        base, overrides = ([_inner(o, known) for o in options] for options in (base, overrides))
        known = known | {"base.hidden", "base.out"}
    kept = [o for o in base if not o.startswith("method.") or o[7:].split("=")[0] in known]
    others = [o for o in company(method, [*kept, *overrides]) if o.split("=")[0] not in chosen]
    return [*kept, *others, *overrides]


def _inner(option: str, known: set[str]) -> str:
    field = option.removeprefix("method.").split("=")[0]
    strange = option.startswith("method.") and field.partition(".")[0] not in known
    return f"method.base.{option.removeprefix('method.')}" if strange else option


def company(method: str, options: Sequence[str]) -> list[str]:
    """What a method that is one half of a federated rule needs besides these options: strategy, consent, examples.

    What the server trains is trained shortly.
    """
    consent = ["payload.allow=[projections]"] if method == "fedca" else []
    chosen = [*strategy_of(method), *(o for o in options if o.startswith("strategy="))]
    short = {"strategy=flesd": ["strategy.epochs=1"], "strategy=orchestra": ["strategy.steps=20"]}
    public = public_like(options) if method == "flesd" else []
    return [*strategy_of(method), *consent, *public, *(short.get(chosen[-1], []) if chosen else [])]


def public_like(options: Sequence[str]) -> list[str]:
    """Public examples of the shape of the generated ones that these options ask for; else of the digits'."""
    own = [o for o in options if o.startswith(("data=synthetic", "data."))]
    if not own:
        grey = ["public.channels=1", "public.augment.mean=[0.5]", "public.augment.std=[0.25]"]
        return ["data@public=synthetic", "public.size=8", "public.train=64", *grey]
    return [*(o.replace("data=", "data@public=").replace("data.", "public.") for o in own), "public.seed=1"]


def strategy_of(method: str) -> list[str]:
    """The strategy of the method's name, where there is one: a method may be one half of a federated rule."""
    return [f"strategy={method}"] if method in config.options_of("strategy") else []


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    torch.set_num_threads(1)
    return


@pytest.fixture
def plan(tmp_path: Path) -> Callable[..., Plan]:
    """A plan of a tiny run in this test's folder; overrides come last and win."""

    def compose(*overrides: str, name: str = "run") -> Plan:
        base = tiny(*overrides)[: -len(overrides) or None]
        if any(o in ("engine=ray",) for o in overrides):
            base.remove("engine.workers=2")
        if any(o.startswith("partition=") for o in overrides):
            base = [o for o in base if not o.startswith("partition.")]
        return config.compose([*base, f"out={tmp_path}", f"name={name}", *overrides])

    return compose


def execute(plan: Plan) -> RunDirectory:
    """Run a plan to its end, without progress or report."""
    rundir = plan.open()
    plan.build_engine().run(plan.job, rundir, Reporter(quiet=True))
    return rundir


def final_arrays(rundir: RunDirectory) -> Arrays:
    """The merged arrays of the last checkpoint."""
    point = rundir.latest()
    assert point is not None
    return point.arrays


def assert_same(a: Arrays, b: Arrays) -> None:
    """Bit for bit the same arrays."""
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert value.dtype == b[key].dtype, key
        assert value.tobytes() == b[key].tobytes(), key


def copy_of_the_sources(folder: Path) -> Path:
    """What is shipped, in a folder whose name Flower accepts as an app's."""
    for name in ("fedssl", "strategies", "simulations", "conf"):
        shutil.copytree(ROOT / name, folder / "fedssl" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "fedssl")
    return folder / "fedssl"
