"""Weights of networks that were trained elsewhere: files read without pickle, names translated to this project's.

Known are the names of torchvision's ResNets, which solo-learn, lightly and the authors' codes of most methods have
behind a prefix (`backbone.layer1.0.conv1.weight`), and lightly's numbered ones (`backbone.4.0.conv1.weight`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fedssl.errors import ConfigError
from fedssl.modalities.encoders import Residual
from fedssl.parts import Arrays

SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt")
PREFIXES = ("module.", "model.", "backbone.", "encoder_q.", "base_encoder.", "encoder.", "network.", "resnet.")
NESTED = ("state_dict", "model_state_dict", "model")  # where a checkpoint keeps its arrays
_NUMBERED = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}  # resnet.children()
_BLOCK = re.compile(r"layer([1-4])\.([01])\.(.+)")  # of ResNet-18; the blocks of deeper ones have no place
_INSIDE = {"bn1": "norm1", "bn2": "norm2", "downsample": "shortcut"}  # a block; its convolutions are called alike
_STEM = {"conv1": "0", "bn1": "1"}
_FEW = 3  # names that a refusal tells


def read_foreign(path: Path) -> Arrays:
    """The arrays of a file, without the prefixes of its encoder and without what lies beside it there.

    Raises:
        ConfigError: the file is not there, of another kind, damaged, or would have to run code.
    """
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"start={path} is not a file of weights: give a run, or a file of {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise ConfigError(f"start={path} does not exist: give a run that has ended, or a file of weights")
    tensors = _safetensors(path) if path.suffix == ".safetensors" else _checkpoint(path)
    found = {
        key: (value.detach().float() if value.is_floating_point() else value.detach()).numpy()
        for key, value in _bare(tensors).items()
    }
    if bad := [key for key, value in found.items() if not np.isfinite(value).all()]:
        raise ConfigError(f"start={path} holds numbers that are not finite, in {bad[0]}: get it anew, or do without it")
    return found


def fit_names(arrays: Arrays, network: nn.Module, where: str) -> Arrays:
    """The arrays under the names of `network`: as they are, or translated from torchvision's names of a ResNet.

    Args:
        arrays: as `read_foreign` gives them. A classifier on top (`fc`, `classifier`, `head`) is left out; counters of
            batches may be absent.
        network: what they are for.
        where: the file, for a refusal.

    Raises:
        ConfigError: arrays are missing, have no place or another shape; the first of each are named.
    """
    own = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    known = {key: value for key, value in arrays.items() if not key.startswith(("fc.", "classifier.", "head."))}
    known = _translated(_lettered(known), network)
    wrong = {
        "it lacks": [name for name in own if name not in known and not name.endswith("num_batches_tracked")],
        "no place here has": [name for name in known if name not in own],
        "another shape has": [
            f"{name} {known[name].shape}, here {shape}"
            for name, shape in own.items()
            if name in known and tuple(known[name].shape) != shape
        ],
    }
    if found := [f"{what} {_some(names)}" for what, names in wrong.items() if names]:
        raise ConfigError(
            f"start={where} has another encoder, {', and '.join(found)}: of torchvision's networks ResNet-18 fits, "
            "with encoder=resnet18 encoder.norm=batch, and encoder.stem=large if its first kernel is 7x7"
        )
    return known


def _some(names: Sequence[str]) -> str:
    return "; ".join(names[:_FEW]) + (f" and {len(names) - _FEW} more" if len(names) > _FEW else "")


def _safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"start={path} is damaged or no safetensors file ({error}): get it anew") from error
    return found


def _checkpoint(path: Path) -> dict[str, Tensor]:
    """The arrays of a file of `torch.save`. Nothing in it is run: one that needs code is refused."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of its unpickler, its zip files or torch itself, none of them documented
        raise ConfigError(
            f"start={path} is damaged, or holds objects that only running its code could make, which is refused: save "
            "its arrays alone, torch.save(model.state_dict(), FILE), or as safetensors"
        ) from error
    inner = [
        content[name] for name in NESTED if isinstance(content, Mapping) and isinstance(content.get(name), Mapping)
    ]
    table = inner[0] if inner else content
    named = table.items() if isinstance(table, Mapping) else ()
    found = {str(key): value for key, value in named if isinstance(value, Tensor)}
    if not found:
        raise ConfigError(f"start={path} holds no arrays under names: give what model.state_dict() gives")
    return found


def _bare(arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without prefixes, one after another; what has none of them (heads, a momentum encoder) is beside the encoder."""
    while prefix := next((p for p in PREFIXES if any(key.startswith(p) for key in arrays)), ""):
        arrays = {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}
    return arrays


def _lettered(arrays: Arrays) -> Arrays:
    """The names of a ResNet that was cut up by `children()` as torchvision gives them; others as they are."""
    if not any(re.match(r"[4-7]\.\d+\.bn1\.", key) for key in arrays):
        return arrays
    parted = {key: key.partition(".") for key in arrays}
    return {f"{_NUMBERED.get(parted[key][0], parted[key][0])}.{parted[key][2]}": value for key, value in arrays.items()}


def _translated(arrays: Arrays, network: nn.Module) -> Arrays:
    """torchvision's names as those of `ResNet18`, whose stem and blocks are numbered; others as they are."""
    blocks = [name for name, child in network.named_children() if isinstance(child, Residual)]
    found = {}
    for key, value in arrays.items():
        first, _, rest = key.partition(".")
        if match := _BLOCK.fullmatch(key):
            at = 2 * (int(match[1]) - 1) + int(match[2])
            inner, _, last = match[3].partition(".")
            block = blocks[at] if at < len(blocks) else key
            found[f"{block}.{_INSIDE.get(inner, inner)}.{last}"] = value
        else:
            found[f"{_STEM[first]}.{rest}" if first in _STEM else key] = value
    return found
