"""Configuration: yaml and dataclasses agree, and every wrong option gets one sentence."""

from __future__ import annotations

import dataclasses
import inspect
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import tiny
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from fedssl import config
from fedssl.build import build, coerce, construct, load
from fedssl.client import Local
from fedssl.errors import ConfigError
from fedssl.job import Job, parse
from fedssl.job.sections import Consent, Evaluate, Federation

CONF = config.conf_dir()
GROUP_FILES = sorted(str(p.relative_to(CONF)) for p in CONF.glob("*/*.yaml"))
OBJECT_FILES = [name for name in GROUP_FILES if not name.startswith("experiment/")]


def node(name: str) -> dict[str, Any]:
    tree: dict[str, Any] = yaml.safe_load((CONF / name).read_text())
    for default in tree.pop("defaults", ()):  # "/encoder@first: conv4" fills a field, the others are Hydra's own
        for key, option in default.items() if isinstance(default, dict) else ():
            if key.startswith("/") and option is not None:
                group, _, place = key.removeprefix("/").partition("@")
                *outer, field = place.split(".")
                inner = tree
                for name in outer:
                    inner = inner.setdefault(name, {})
                inner[field] = node(f"{group}/{option}.yaml")
    return tree


def plain(value: Any) -> Any:
    """An object's fields as yaml would hold them, nested nodes without their _target_."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
    if isinstance(value, tuple | list):
        return [plain(v) for v in value]
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items() if k != "_target_"}
    return value


@pytest.mark.parametrize("name", OBJECT_FILES)
def test_yaml_lists_every_field_with_a_comment(name: str) -> None:
    assert (CONF / name).read_text().startswith("# "), "the first line describes the option"
    tree = node(name)
    cls = load(tree.pop("_target_"))
    if name.startswith("strategy/"):
        tree.pop("share")
    if dataclasses.is_dataclass(cls):
        assert set(tree) == {f.name for f in dataclasses.fields(cls) if f.init}
    else:
        assert set(tree) <= set(inspect.signature(cls).parameters)


def test_yaml_defaults_equal_the_dataclass_defaults() -> None:
    matched = set()
    classes = set()
    for name in OBJECT_FILES:
        tree = node(name)
        tree.pop("share", None)
        cls = load(tree.pop("_target_"))
        if not dataclasses.is_dataclass(cls):
            continue
        classes.add(cls)
        required = {f.name for f in dataclasses.fields(cls) if f.init and _required(f)}
        default = cls(**{key: "x" for key in required})
        if plain({k: v for k, v in tree.items() if k not in required}) == {
            k: v for k, v in plain(default).items() if k not in required
        }:
            matched.add(cls)
    assert classes == matched, f"no yaml equals the defaults of {[c.__name__ for c in classes - matched]}"


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


@pytest.mark.parametrize(
    ("section", "cls"), [("local", Local), ("federation", Federation), ("evaluate", Evaluate), ("payload", Consent)]
)
def test_sections_equal_their_dataclasses(section: str, cls: Any) -> None:
    assert yaml.safe_load((CONF / "config.yaml").read_text())[section] == plain(cls())


@pytest.mark.parametrize("name", [n for n in OBJECT_FILES if not n.startswith(("strategy/", "data/"))])
def test_every_option_builds(name: str) -> None:
    tree = {key: "x" if value == "???" else value for key, value in node(name).items()}
    build(tree, name.split("/")[0])


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("method.tmperature=1", "did you mean method.temperature"),
        ("method=simclrr", "did you mean method=simclr"),
        ("strategy=fedemaa", "strategy=fedemaa does not exist"),
        ("local.lr=fast", "give a number"),
        ("local.lr=-1", "positive number"),
        ("local.epochs=1.5", "a whole number"),
        ("local.epochs=0", "at least 1"),
        ("local.optimizer=lars", "sgd or adamw"),
        ("participation.fraction=0", "(0, 1]"),
        ("federation.fraction=0.5", "did you mean participation.fraction"),
        ("participation=poison", "did you mean participation=poisson"),
        ("participation.draw=often", "uniform or poisson"),
        ("participation.late=never", "partial or out"),
        ("participation.deadline_s=5", "pace"),
        ("participation.dropout=1", "below 1"),
        ("participation=replay", "participation.path is missing"),
        ("participation.available=day_night", "wrong type"),
        ("federation.quorum=0", "from 1 to"),
        ("federation.quorum=11", "cannot come from 10 clients"),
        ("federation.below_quorum=wait", "skip or end"),
        ("federation.clients=0", "at least 1"),
        ("method.temperature=0", "temperature"),
        ("+nonsense=1", "not a section"),
        ("strategy.share={teacher: merge}", "names no part"),
        ("strategy.share={encoder: derived}", "derive it from"),
        ("strategy.share={encoder: mine}", "merge, local or derived"),
        ("data.augment.flip=2", "probability"),
        ("data=npz", "data.path is missing"),
        ("engine.workers=-1", "negative"),
        ("method._target_=os.system", "outside"),
        ("=", "key=value"),
        ("compression.keep=0", "(0, 1]"),
        ("compression=top", "did you mean compression=topk"),
        ("payload.allow=[enc]", "no part of this method"),
        ("device=tpu9", "device"),
        ("seed=-1", "seed"),
    ],
)
def test_wrong_options_get_one_sentence(override: str, sentence: str, tmp_path: Path) -> None:
    from fedssl.job.setup import build_model, device_of, shares_of

    with pytest.raises(ConfigError) as caught:
        job = config.compose([override]).job
        device_of(job)
        model = build_model(job, (1, 8, 8))
        shares_of(job, model)
        model_loss_temperature(job, model)
    text = str(caught.value)
    assert sentence in text, text
    assert "\n" not in text


def model_loss_temperature(job: Job, model: Any) -> None:
    """The last resort: options that only the loss can judge."""
    import torch

    from fedssl.method import Batch, Step

    views = [torch.zeros(2, 1, 8, 8)] * job.method.views
    job.method.loss(model, Batch(views, torch.arange(2)), Step(1, 1, 0, 1))


def test_a_job_travels_as_text() -> None:
    job = config.compose(["method=byol", "strategy.share={teacher: local}"]).job
    twin = Job(__import__("json").loads(job.text))
    assert twin.text == job.text
    assert twin.method == job.method
    assert twin.share == {"teacher": "local"}
    assert parse(job.text) is parse(job.text)


def test_the_fingerprint_follows_every_value() -> None:
    base = config.compose([]).job.fingerprint
    assert config.compose([]).job.fingerprint == base
    assert config.compose(["local.lr=0.0021"]).job.fingerprint != base
    assert config.compose(["engine.workers=3"]).job.fingerprint == base, "the engine does not change the result"


def test_coerce_is_strict() -> None:
    assert coerce(1, float, "x") == 1.0
    assert coerce([1, 2], tuple[float, ...], "x") == (1.0, 2.0)
    assert coerce(None, float | None, "x") is None
    for value, kind in (
        ("1", int),
        (True, int),
        (1.5, int),
        ("a", float),
        (1, bool),
        (1, str),
        ([1], tuple[float, float]),
    ):
        with pytest.raises(ConfigError):
            coerce(value, kind, "x")


def test_construct_names_the_missing_and_the_unknown() -> None:
    @dataclasses.dataclass(frozen=True)
    class Thing:
        path: str
        size: int = 1

    with pytest.raises(ConfigError, match="thing.path is missing"):
        construct(Thing, {}, "thing")
    with pytest.raises(ConfigError, match="did you mean size"):
        construct(Thing, {"path": "x", "sizes": 2}, "thing")


def test_foreign_packages_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sys
    import types

    foreign = types.ModuleType("strategies.mine")
    foreign.__file__ = str(tmp_path / "strategies" / "mine.py")
    foreign.Mine = object  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "strategies.mine", foreign)
    with pytest.raises(ConfigError, match="rename or uninstall"):
        load("strategies.mine.Mine")


@pytest.mark.parametrize("name", config.options_of("experiment"))
def test_every_experiment_composes_and_says_its_command(name: str) -> None:
    text = (CONF / "experiment" / f"{name}.yaml").read_text()
    command = next(line.removeprefix("# Command: ") for line in text.splitlines() if line.startswith("# Command: "))
    words = shlex.split(command)
    overrides = words[2:] if words[:2] == ["fedssl", "pretrain"] else [f"experiment={name}"]
    assert f"experiment={name}" in overrides
    assert config.compose(overrides).path.name == name


@pytest.mark.parametrize("name", config.options_of("experiment"))
def test_every_row_of_a_card_composes_and_a_card_says_what_was_run(name: str) -> None:
    text = (CONF / "experiment" / f"{name}.yaml").read_text()
    command = next(line.removeprefix("# Command: ") for line in text.splitlines() if line.startswith("# Command: "))
    rows = re.findall(r"^#   (\S*=.*?)\s+\d\d\.\d", text, flags=re.MULTILINE)
    for row in rows:
        job = config.compose([*shlex.split(command)[2:], *row.split()]).job
        job.check()
    if "Reproduction card" in text:
        assert len(rows) >= 4
        for heading in ("Source:", "Protocol:", "tolerance", "Differs from the paper:", "run"):
            assert heading in text, heading


def test_an_empty_shard_is_refused_whoever_made_it() -> None:
    from fedssl.job import split
    from fedssl.partition import Iid

    class Stingy(Iid):
        def split(self, data: Any, clients: int, rng: Any) -> Any:
            return [rows[:0] if i == 4 else rows for i, rows in enumerate(super().split(data, clients, rng))]

    job = Job(config.compose([]).job.tree)
    job.__dict__["partition"] = Stingy()
    with pytest.raises(ConfigError, match="the first is client 4"):
        split(job, job.data.load().train)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        tiny("method=byol", "strategy.share.teacher=local"),
        tiny("method=flesd"),
        tiny("method=clip", modality="pairs"),
        tiny("data.steps=24", modality="timeseries"),
        ["encoder=resnet18", "data=synthetic_signals"],
        ["experiment=demo", "encoder@encoders.a=conv4", "encoders.a.width=3"],
        ["method=moco", "method=moco"],
        ["method=moco", "seed=0,1"],
        ["pace=fixed"],
        ["local.speed=1"],
    ],
)
def test_what_the_tests_compose_quickly_is_what_hydra_composes(overrides: list[str]) -> None:
    def composed(way: Callable[..., DictConfig]) -> object:
        GlobalHydra.instance().clear()
        with initialize_config_dir(str(CONF), version_base="1.3"):
            try:
                return OmegaConf.to_yaml(way("config", config.relax(overrides)))
            except HydraException as error:
                return str(error)

    quick = config.hydra_compose
    assert composed(quick) == composed(quick) == composed(quick.genuine)
