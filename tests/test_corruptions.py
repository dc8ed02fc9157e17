"""Corruptions against hand computed cases, and the command that measures under them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest
import torch
from conftest import execute

from fedssl.config import Plan
from fedssl.errors import ConfigError
from fedssl.measures.corruptions import KINDS, SEVERITIES, corrupt
from simulations import inspect_runs

SHAPES = [(6, 3, 8, 8), (6, 1, 28, 28), (6, 9, 128), (2, 1, 5, 7)]


def images(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_corruptions_grow_with_severity_and_leave_the_input_alone(kind: str, shape: tuple[int, ...]) -> None:
    x = images(shape)
    before, distances = x.clone(), []
    for severity in SEVERITIES:
        y = corrupt(x, kind, severity, 3)
        assert y.shape == x.shape
        assert torch.isfinite(y).all()
        assert torch.equal(y, corrupt(x, kind, severity, 3))
        distances.append((y - x).square().mean().sqrt().item())
    assert torch.equal(x, before)
    assert distances[0] > 0
    if kind in ("noise", "contrast"):
        assert distances == sorted(distances)


def test_noise_has_the_stated_deviation() -> None:
    x = images((200, 1, 16, 16))
    assert (corrupt(x, "noise", 3, 0) - x).std().item() == pytest.approx(0.26 * x.std().item(), rel=0.02)


def test_contrast_keeps_the_mean_and_shrinks_the_deviation() -> None:
    x = images((4, 3, 8, 8))
    y = corrupt(x, "contrast", 2, 0)
    torch.testing.assert_close(y.mean((2, 3)), x.mean((2, 3)))
    torch.testing.assert_close(y.std((2, 3)), 0.45 * x.std((2, 3)))


def test_blur_keeps_flat_images_and_spreads_a_point_as_a_gaussian() -> None:
    flat = torch.full((2, 1, 16, 16), 0.7)
    torch.testing.assert_close(corrupt(flat, "blur", 5, 0), flat)
    point = torch.zeros(1, 1, 65)
    point[0, 0, 32] = 1
    y = corrupt(point, "blur", 3, 0)[0, 0]
    at = torch.arange(65) - 32.0
    assert y.sum().item() == pytest.approx(1, abs=1e-5)
    assert math.sqrt((y * at**2).sum()) == pytest.approx(0.06 * 65, rel=0.03)


def test_shift_moves_by_the_stated_share_either_way() -> None:
    x = torch.arange(100.0).expand(50, 1, 100)
    y = corrupt(x, "shift", 4, 0) - x
    assert sorted({round(v, 3) for v in y[:, 0, 50].tolist()}) == [-12.0, 12.0]
    assert corrupt(x, "shift", 4, 0).max() == 99, "the edge is repeated"


def test_what_cannot_be_corrupted_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown"):
        corrupt(images((1, 1, 4, 4)), "fog", 1, 0)
    with pytest.raises(ConfigError, match="unknown"):
        corrupt(images((1, 1, 4, 4)), "blur", 6, 0)
    with pytest.raises(ConfigError, match="images and time series"):
        corrupt(images((4, 4)), "blur", 1, 0)


def test_probe_reports_every_kind(plan: Callable[..., Plan], capsys: pytest.CaptureFixture[str]) -> None:
    run = execute(plan())
    assert inspect_runs.probe([str(run.path), "--corruptions"]) == 0
    shown = capsys.readouterr().out
    measured = json.loads((run.path / "corruptions.json").read_text())
    for values in measured.values():
        assert list(values) == ["clean", *KINDS]
        assert all(len(values[kind]) == 5 for kind in KINDS)
        assert all(0 <= v <= 1 for series in values.values() for v in series)
    assert all(kind in shown for kind in KINDS)
    assert (run.path / "figures" / "corruptions.png").read_bytes()[:4] == b"\x89PNG"
    assert inspect_runs.probe([str(run.path)]) == 0
    clean = float(dict(line.split() for line in capsys.readouterr().out.splitlines())["linear_accuracy"])
    assert measured["pretrained"]["clean"][0] == pytest.approx(clean, abs=1e-4), "the same classifier"


def test_probe_takes_some_kinds_and_refuses_others(plan: Callable[..., Plan]) -> None:
    run = execute(plan())
    inspect_runs.probe([str(run.path), "--corruptions", "noise,shift"])
    assert list(json.loads((run.path / "corruptions.json").read_text())["pretrained"]) == ["clean", "noise", "shift"]
    with pytest.raises(ConfigError, match="fog"):
        inspect_runs.probe([str(run.path), "--corruptions", "fog"])
    with pytest.raises(ConfigError, match="exactly one"):
        inspect_runs.probe(["--corruptions"])
