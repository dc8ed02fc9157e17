"""The table of docs/privacy.md is what the code says, and what it calls valid trains with noise."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import tiny

from benchmarks import pages, validity
from fedssl import config, seeds
from fedssl.errors import ConfigError, PrivacyError
from fedssl.job.setup import build_model, data_of, public_of
from fedssl.method import Batch, MultiCrop, Step
from fedssl.privacy.per_record import trainable
from fedssl.privacy.record_dp import RecordDP

RECORD = [name for name in validity.MECHANISMS if name.startswith("`")]


def cells() -> list[tuple[str, str, str]]:
    """(method, mechanism, text) of every cell of the page."""
    text = validity.PAGE.read_text(encoding="utf-8").split(pages.begin(validity.COMMAND))[1].split(pages.END)[0]
    head, _, *rows = [[part.strip() for part in line.strip("|").split("|")] for line in text.splitlines()]
    return [(row[0].strip("`"), name, cell) for row in rows for name, cell in zip(head[1:], row[1:], strict=True)]


def test_the_page_has_every_method_and_mechanism() -> None:
    found = cells()
    assert {method for method, _, _ in found} == set(validity.methods())
    assert {name for _, name, _ in found} == set(validity.MECHANISMS)


def options(method: str, name: str, text: str) -> list[str]:
    """Of a cell's job; `None` changes where it is refused."""
    changes = text.removeprefix("with `").removesuffix("`").split() if text.startswith("with") else []
    public = ["data@public=synthetic", "public.seed=1"] if any(c.endswith("=public") for c in changes) else []
    return [*validity.base(method), *validity.MECHANISMS[name], *changes, *public]


@pytest.mark.parametrize(("method", "name", "text"), cells(), ids=lambda value: value[:24])
def test_a_cell_is_what_the_code_says(method: str, name: str, text: str) -> None:
    if text == "refused":
        with pytest.raises((PrivacyError, ConfigError)):
            config.compose(options(method, name, text))
        return
    job = config.compose(options(method, name, text)).job
    if text != "valid":
        with pytest.raises((PrivacyError, ConfigError)):
            config.compose(options(method, name, "valid"))
    if name not in RECORD:
        return
    modality = "pairs" if method == "clip" else "images"
    small = ["public.size=8"] if "data@public=synthetic" in options(method, name, text) else []
    chosen = [*options(method, name, text), *small, "privacy.epsilon=null", "privacy.noise_multiplier=1"]
    job = config.compose(tiny(*chosen, modality=modality)).job
    job.privacy.check(job.method)
    data = data_of(job, torch.device("cpu"))
    shard = data.train.shard(torch.arange(24).numpy(), 0)
    model = build_model(job, data.train.shape, len(shard)).train()
    assert isinstance(job.privacy, RecordDP)
    job.method.after_merge(model, shard, public_of(job, torch.device("cpu")), job.data.augment, Step(1, 2, 0, 1))
    job.privacy.admit(job.method, model, shard, job.data.augment)
    transform = job.privacy.planned(len(shard), 12, 1, 2)
    index = next(index for index in transform.batches(24, 12, 1, seeds.stream(0, "order")) if len(index))
    augment, generator = job.data.augment, torch.Generator().manual_seed(0)
    views = [*augment.views(shard.batch(index), generator, job.method.views)]
    if job.method.local_views and isinstance(augment, MultiCrop):
        views += augment.local_views(shard.batch(index), generator, job.method.local_views)
    public = public_of(job, torch.device("cpu"))
    rows = torch.arange(0 if public is None else min(8, len(public)))
    beside = (
        (augment.plain(public.batch(rows)), rows) if public is not None and job.method.public_batch else (None, None)
    )
    out = transform.backward(
        job.method, model, Batch(views, index, *beside), Step(1, 2, 0, 1), seeds.stream(0, "noise")
    )
    assert math.isfinite(float(out.loss))
    for parameter in trainable(model):
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
        assert parameter.grad.abs().sum() > 0, "noise on everything that is trained"
