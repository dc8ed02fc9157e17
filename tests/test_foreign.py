"""Weights from elsewhere: torchvision's names and those behind prefixes, and files that are refused."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny
from safetensors.torch import save_file
from torch import Tensor, nn

from fedssl import config
from fedssl.errors import ConfigError
from fedssl.job.setup import data_of, initial_model
from fedssl.modalities.encoders import ResNet18
from fedssl.model import load_arrays
from fedssl.networks.foreign import fit_names, read_foreign


class BasicBlock(nn.Module):
    """As in torchvision's resnet.py."""

    def __init__(self, fan_in: int, fan_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(fan_in, fan_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(fan_out)
        self.conv2 = nn.Conv2d(fan_out, fan_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(fan_out)
        self.downsample: nn.Module | None = None
        if stride != 1 or fan_in != fan_out:
            self.downsample = nn.Sequential(nn.Conv2d(fan_in, fan_out, 1, stride, bias=False), nn.BatchNorm2d(fan_out))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


class Reference(nn.Module):
    """torchvision's ResNet-18 with its names, in torch alone; `large` is its own stem, else the one for CIFAR."""

    def __init__(self, width: int, large: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False) if large else nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, 1) if large else nn.Identity()
        sizes = [width, width, 2 * width, 4 * width, 8 * width]
        for at, (fan_in, fan_out) in enumerate(pairwise(sizes), 1):
            first = BasicBlock(fan_in, fan_out, 1 if at == 1 else 2)
            setattr(self, f"layer{at}", nn.Sequential(first, BasicBlock(fan_out, fan_out, 1)))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8 * width, 10)

    def features(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for at in range(1, 5):
            x = getattr(self, f"layer{at}")(x)
        return self.avgpool(x).flatten(1)


def trained(large: bool = False, width: int = 4) -> Reference:
    """With statistics that are not those of the beginning."""
    with torch.random.fork_rng():  # torch's constructors draw from the global generator
        torch.manual_seed(0)
        net = Reference(width, large)
        for _ in range(2):
            net.features(torch.randn(8, 3, 32, 32))
    return net.eval()


def ours(large: bool = False, norm: str = "batch", width: int = 4) -> nn.Module:
    return ResNet18(width, norm, "large" if large else "small").make((3, 32, 32))[0].eval()


def behind(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{key}": value for key, value in state.items()}


def numbered(net: Reference) -> dict[str, Tensor]:
    return nn.Sequential(*list(net.children())[:-1]).state_dict()


def assert_same_features(path: Path, net: Reference, large: bool = False) -> None:
    network = ours(large)
    load_arrays(network, fit_names(read_foreign(path), network, str(path)))
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted, found = net.features(x), network(x)
    assert wanted.std() > 1e-3
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("large", [False, True])
def test_a_state_dict_of_torchvision_gives_the_same_features(large: bool, tmp_path: Path) -> None:
    net = trained(large)
    torch.save(net.state_dict(), tmp_path / "a.pth")
    assert_same_features(tmp_path / "a.pth", net, large)
    save_file(net.state_dict(), tmp_path / "a.safetensors")
    assert_same_features(tmp_path / "a.safetensors", net, large)


@pytest.mark.parametrize("prefix", ["backbone.", "encoder.", "module.", "module.encoder_q.", "model.backbone."])
def test_prefixes_fall_and_what_lies_beside_is_left(prefix: str, tmp_path: Path) -> None:
    net = trained()
    beside = {"projector.0.weight": torch.ones(2, 2), "momentum_backbone.conv1.weight": torch.ones(1)}
    outer = prefix.partition(".")[0] + "." if prefix.count(".") > 1 else ""
    state = {**({} if prefix == "module." else behind(outer, beside)), **behind(prefix, net.state_dict())}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "a.ckpt")
    assert_same_features(tmp_path / "a.ckpt", net)


def test_the_numbered_names_of_lightly(tmp_path: Path) -> None:
    net = trained()
    torch.save(behind("backbone.", numbered(net)), tmp_path / "a.pt")
    assert_same_features(tmp_path / "a.pt", net)


def test_counters_may_be_absent(tmp_path: Path) -> None:
    net = trained()
    torch.save({k: v for k, v in net.state_dict().items() if not k.endswith("tracked")}, tmp_path / "a.pth")
    assert_same_features(tmp_path / "a.pth", net)


def refusal(state: object, folder: Path, network: nn.Module) -> str:
    torch.save(state, folder / "a.pth")
    with pytest.raises(ConfigError) as caught:
        fit_names(read_foreign(folder / "a.pth"), network, "a.pth")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    state = trained().state_dict()
    few = {key: value for key, value in state.items() if key != "layer3.0.downsample.0.weight"}
    assert "it lacks 7.shortcut.0.weight" in refusal(few, tmp_path, ours())
    deeper = {**state, "layer1.2.conv1.weight": torch.ones(4, 4, 3, 3)}
    assert "no place here has layer1.2.conv1.weight" in refusal(deeper, tmp_path, ours())
    assert "0.weight (4, 3, 3, 3), here (4, 3, 7, 7)" in refusal(state, tmp_path, ours(large=True))
    assert "more: of torchvision's" in refusal(state, tmp_path, ours(width=8))
    assert "running_mean" in refusal(state, tmp_path, ours(norm="group"))
    broken = {**state, "conv1.weight": state["conv1.weight"] / 0}
    assert "not finite, in conv1.weight" in refusal(broken, tmp_path, ours())
    assert "no arrays" in refusal({"state_dict": {"a": 1}}, tmp_path, ours())
    assert "no arrays" in refusal([torch.ones(2)], tmp_path, ours())


class Trap:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.mark),)


def test_nothing_in_a_file_is_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    said = refusal({**trained().state_dict(), "hyper": Trap(mark)}, tmp_path, ours())
    assert "only running its code could make" in said
    assert not mark.exists()
    torch.load(tmp_path / "a.pth", weights_only=False)
    assert mark.exists(), "the trap works"


def test_damaged_absent_and_other_files(tmp_path: Path) -> None:
    for name in ("a.pth", "a.safetensors"):
        (tmp_path / name).write_bytes(b"nothing")
        with pytest.raises(ConfigError, match="damaged"):
            read_foreign(tmp_path / name)
    with pytest.raises(ConfigError, match="does not exist"):
        read_foreign(tmp_path / "b.pth")
    with pytest.raises(ConfigError, match="not a file of weights"):
        read_foreign(tmp_path / "b.bin")


def test_a_federation_begins_with_it(tmp_path: Path) -> None:
    net = trained()
    torch.save(behind("backbone.", net.state_dict()), tmp_path / "a.pth")
    options = [o for o in tiny("method=byol") if not o.startswith("encoder.")]
    encoder = ("encoder=resnet18", "encoder.width=4", "encoder.norm=batch")
    job = config.compose([*options, *encoder, f"start={tmp_path / 'a.pth'}"]).job
    model = initial_model(job, data_of(job, torch.device("cpu")).train.shape)
    assert torch.equal(model["encoder"].get_submodule("3").conv1.weight, net.layer1[0].conv1.weight)
    assert torch.equal(model["teacher"]["encoder"].get_submodule("10").norm2.running_var, net.layer4[1].bn2.running_var)
    group = config.compose([*options, *encoder[:2], f"start={tmp_path / 'a.pth'}"]).job
    with pytest.raises(ConfigError, match=r"encoder\.norm=batch"):
        initial_model(group, data_of(group, torch.device("cpu")).train.shape)
