"""The optimisers of local training take the steps of torch's classes, bit for bit, and import no compiler."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, tiny
from torch import nn

from fedssl.client import Local
from fedssl.descent import Descent


def network() -> nn.Module:
    torch.manual_seed(0)
    frozen = nn.Linear(4, 4).requires_grad_(False)
    return nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.GroupNorm(1, 5), nn.Flatten(), nn.Linear(20, 4), frozen, nn.Linear(4, 2)
    )


def torchs(model: nn.Module, local: Local) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": local.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    if local.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=local.lr, momentum=local.momentum)
    return torch.optim.AdamW(groups, lr=local.lr, fused=True)


@pytest.mark.parametrize(
    "local",
    [
        Local(optimizer="adamw", weight_decay=0.1),
        Local(optimizer="sgd", weight_decay=0.1),
        Local(optimizer="sgd", momentum=0.0, weight_decay=0.0),
    ],
)
def test_the_steps_are_torchs(local: Local) -> None:
    """With rates that change, and a layer that gets its first gradient late and loses it again."""
    ours, theirs = network(), network()
    descent, reference = Descent(ours, local), torchs(theirs, local)
    for i, rate in enumerate((0.1, 0.05, 0.2, 0.01)):
        x = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(i))
        for group in reference.param_groups:
            group["lr"] = rate
        descent.zero_grad()
        reference.zero_grad(set_to_none=True)
        for model in (ours, theirs):
            assert isinstance(model, nn.Sequential)
            last = model if i in (1, 2) else model[:-1]
            last(x).square().mean().backward()
        descent.step(rate)
        reference.step()
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(mine, other)
    assert not torch.equal(ours.get_parameter("5.weight"), network().get_parameter("5.weight"))


def test_a_run_imports_no_compiler(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from fedssl import simulate\n"
        f"simulate(*{[*tiny(), f'out={tmp_path}']!r})\n"
        "print([name for name in sys.modules if name.startswith('torch._dynamo')])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
