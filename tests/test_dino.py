"""DINO: its centre as a part (local, merged, public, none), temperatures over the run, multi-crop."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from conftest import execute, final_arrays
from test_methods import STEP, batch_of, job_of, model_of

from fedssl.config import Plan
from fedssl.errors import ConfigError
from fedssl.flower import state_files
from fedssl.job.setup import public_of
from fedssl.losses import dino
from fedssl.method import Batch, Step
from fedssl.networks.teacher import Target
from fedssl.parts import Coupling

Compose = Callable[..., Plan]


def test_the_loss_is_the_mean_over_pairs_of_different_views() -> None:
    job = job_of("dino", "method.local_views=2", "data.size=16")
    model = model_of(job)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(5, 3, 16, 16, generator=generator)
    augment = job.data.augment
    views = [*augment.views(x, generator, 2), *augment.local_views(x, generator, 2)]
    assert [tuple(v.shape[2:]) for v in views] == [(16, 16), (16, 16), (8, 8), (8, 8)]
    step = Step(1, 10, 0, 1)
    out = job.method.loss(model, Batch(views, torch.arange(5)), step)
    student = [model["projector"](model["encoder"](view)) for view in views]
    target = Target(model)
    teacher = [target(view) for view in views[:2]]
    center = model["center"].value
    each = [
        dino(student[j], teacher[i], center, student_temperature=0.1, teacher_temperature=0.04).mean()
        for i in range(2)
        for j in range(4)
        if i != j
    ]
    assert len(each) == 6
    torch.testing.assert_close(out.loss, torch.stack(each).mean())


def test_the_teachers_temperature_warms_up() -> None:
    method = job_of("dino", "method.teacher_temperature_warmup=0.5").method
    values = [method._sharpness(Step(r, 10, 0, 1)) for r in (1, 3, 6, 10)]  # type: ignore[attr-defined]
    assert values == pytest.approx([0.04, 0.04 + 0.4 * 0.03, 0.07, 0.07])


def test_a_running_centre_follows_the_teachers_mean() -> None:
    job = job_of("dino")
    model, batch = model_of(job), batch_of(job, 8)
    out = job.method.loss(model, batch, STEP)
    target = Target(model)
    mean = torch.cat([target(view) for view in batch.views]).mean(0)
    job.method.after_step(model, out, STEP)
    torch.testing.assert_close(model["center"].value, 0.1 * mean)


def test_the_centre_is_local_or_merged(plan: Compose) -> None:
    local = execute(plan("method=dino", name="local"))
    assert "center.value" not in final_arrays(local)
    path = state_files.newest(local.clients, 0, 99)
    assert path is not None
    assert state_files.read(path).local["center.value"].any()
    merged = execute(plan("method=dino", "strategy.share.center=merge", name="merged"))
    assert final_arrays(merged)["center.value"].any()


def test_a_public_centre_uncouples_and_reads_public_examples_only(plan: Compose) -> None:
    with pytest.raises(ConfigError, match="data@public"):
        plan("method=dino", "method.center=public")
    public = ["data@public=synthetic", "public.size=8", "public.train=20", "public.test=5", "public.seed=9"]
    made = plan("method=dino", "method.center=public", "method.norm=layer", *public)
    assert made.job.method.coupling is Coupling.none
    model = model_of(made.job)
    own = made.job.data.load().train.shard(np.arange(16), 0)
    examples = public_of(made.job, torch.device("cpu"))
    assert examples is not None
    assert len(examples) == 20
    made.job.method.after_merge(model, own, examples, made.job.data.augment, STEP)
    view = made.job.data.augment.plain(examples.batch(torch.arange(20)))
    torch.testing.assert_close(model["center"].value, Target(model)(view).mean(0))
    before = model["center"].value.clone()
    out = made.job.method.loss(model, batch_of(made.job, 8), STEP)
    made.job.method.after_step(model, out, STEP)
    assert torch.equal(model["center"].value, before), "within a round it stays"
    assert execute(made).done


def test_public_examples_of_another_shape_are_refused(plan: Compose) -> None:
    with pytest.raises(ConfigError, match="one encoder cannot take both"):
        execute(plan("method=dino", "method.center=public", "data@public=digits"))


def test_without_a_centre_there_is_no_such_part(plan: Compose) -> None:
    made = plan("method=dino", "method.center=none", "method.norm=layer")
    assert "center" not in model_of(made.job)
    assert made.job.method.coupling is Coupling.none
    assert execute(made).done


def test_multi_crop_trains(plan: Compose) -> None:
    assert execute(plan("method=dino", "method.local_views=3", "data.size=16")).done


@pytest.mark.parametrize(
    "option",
    ["center=batch", "student_temperature=0", "center_momentum=2", "local_views=-1", "prototypes=1", "decay=1.5"],
)
def test_nonsense_is_refused(option: str) -> None:
    with pytest.raises(ConfigError):
        job_of("dino", f"method.{option}")
