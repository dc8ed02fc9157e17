"""Options drawn at random: together they run, repeat and resume to the same bits, or are refused with a sentence."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from conftest import MODALITIES, assert_same, execute, fields_of, final_arrays, public_like, tiny
from test_laws import interrupted

from fedssl import config
from fedssl.aggregation.bounded import Bounded
from fedssl.aggregation.plain import Plain
from fedssl.config import Plan
from fedssl.errors import FedsslError

FEW, MANY = 15, 400  # in `make test`, and in `make test-all`
NEEDS_A_FILE = ("file", "feature_shift", "natural", "sites", "replay")
MAYBE = {  # an option and how often it is taken
    **dict.fromkeys(("local.optimizer=sgd", "evaluate.every=1", "seed=7", "federation.clients=9"), 0.3),
    **dict.fromkeys(("local.clip_norm=1", "local.epochs=2", "engine.cohort=2", "checkpoint_every=2"), 0.2),
    **dict.fromkeys(("local.decorrelation=0.1", "local.batch_size=64", "local.batch_size=3"), 0.1),
    **dict.fromkeys(("local.precision=bf16", "local.channels_last=true", "local.checkpointing=true"), 0.1),
    **dict.fromkeys(("engine.state_limit_mib=0", "engine=processes", "aggregation.exact=false"), 0.1),
    **dict.fromkeys(("federation.quorum=2", "federation.below_quorum=end", "federation.max_change=0.5"), 0.05),
    **dict.fromkeys(("method.decay_schedule=adaptive", "method.negatives=public", "method.similarity=dot"), 0.2),
    **dict.fromkeys(("method.temperature=max_snr", "evaluate.final=true", "baselines=true"), 0.05),
}
LAST_BITS = ("aggregation.exact=false",)  # in which the order of arrival shows


def drawn(rng: random.Random) -> tuple[str, list[str]]:
    """A modality and options; the same for equal seeds."""
    modality = rng.choices(list(MODALITIES), [6, 2, 2, 2])[0]
    found = [f"method={rng.choice(config.options_of('method'))}"]
    for group, often in (("strategy", 0.5), ("partition", 0.4), ("participation", 0.5), ("aggregation", 0.3)):
        if rng.random() < often:
            some = [name for name in config.options_of(group) if name not in NEEDS_A_FILE]
            found.append(f"{group}={rng.choice(some)}")
    if "aggregation" not in found[-1] and rng.random() < 0.4:
        found.append(f"compression={rng.choice(config.options_of('compression'))}")
    if any(option.startswith("participation=") for option in found) and rng.random() < 0.4:
        found.append(f"participation.dropout={rng.choice([0.2, 0.6])}")
    if rng.random() < 0.3:
        found += [f"privacy={rng.choice(['example', 'groups', 'pairs', 'statistics'])}", "privacy.noise_multiplier=1"]
        found += ["method.norm=layer", *rng.choices([[], ["privacy.sample_rate=0.1"]])[0]]
    if modality == "images" and rng.random() < 0.2:
        found += ["encoder=resnet18", "encoder.width=4"]
    if modality == "images" and rng.random() < 0.3:
        found.append(f"encoder.norm={rng.choice(['batch', 'layer', 'none'])}")
    found += [option for option, often in MAYBE.items() if rng.random() < often]
    found.append(f"federation.rounds={rng.choice([1, 2, 4])}")
    if rng.random() < 0.7:
        found.append("federation.tolerate=null")
    known = fields_of(found[0].removeprefix("method="))
    kept = {o.split("=")[0]: o for o in found if not o.startswith("method.") or o[7:].split("=")[0] in known}
    return modality, list(kept.values())


def planned(modality: str, options: Sequence[str], folder: Path, name: str) -> Plan:
    """Their tiny run."""
    base = tiny(*options, modality=modality)
    if any(option.startswith("partition=") for option in options):
        base = [option for option in base if not option.startswith("partition.")]
    if "encoder=resnet18" in options:
        base = [option for option in base if not option.startswith("encoder.dim")]
    if "method.negatives=public" in options:
        base += public_like(base)
    return config.compose([*base, f"out={folder}", f"name={name}"])


def noisy(plan: Plan) -> bool:
    """Whether a round that was lost is repeated with other noise, or other secrets."""
    return plan.job.privacy.private or not isinstance(plan.job.aggregation, Plain | Bounded)


@pytest.mark.parametrize("seed", [pytest.param(n, marks=[pytest.mark.slow] if n >= FEW else []) for n in range(MANY)])
def test_any_options_run_repeat_and_resume_or_are_refused(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modality, options = drawn(random.Random(seed))

    def run(name: str) -> Plan:
        return planned(modality, options, tmp_path, name)

    try:
        first = execute(run("first"))
    except FedsslError as error:
        pytest.skip(str(error))
    arrays = final_arrays(first)
    assert all(np.isfinite(value).all() for value in arrays.values() if value.dtype.kind == "f"), options
    if any(option in LAST_BITS for option in options):
        return
    assert_same(final_arrays(execute(run("again"))), arrays)
    rounds = len(first.rows())
    if rounds > 1 and not noisy(run("resumed")):
        interrupted(run("resumed"), rounds - 1, monkeypatch)
        assert_same(final_arrays(execute(run("resumed"))), arrays)
