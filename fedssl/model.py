"""Models as declared parts: seeded initial values, arrays in and out, teachers that follow."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fedssl import seeds
from fedssl.errors import ProtocolError
from fedssl.networks.norms import is_norm
from fedssl.parts import Arrays, Layout, Part

Model = nn.ModuleDict  # its keys are the names of the parts


def tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Every parameter and persistent buffer of a model under its wire name, without copying.

    The names and the order of `state_dict`, in a fraction of its time: a client's turn asks several times.
    """
    found: list[tuple[str, Tensor]] = []
    _collect(model, "", found)
    return found


def _collect(module: nn.Module, prefix: str, found: list[tuple[str, Tensor]]) -> None:
    for name, parameter in module._parameters.items():
        if parameter is not None:
            found.append((prefix + name, parameter))
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            found.append((prefix + name, buffer))
    for name, child in module._modules.items():
        if child is not None:
            _collect(child, f"{prefix}{name}.", found)


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter of a model under its wire name; one that is there twice, under both."""
    return {name: value for name, value in tensors(model) if isinstance(value, nn.Parameter)}


def norm_keys(model: nn.Module) -> frozenset[str]:
    """The names of all arrays that belong to normalisation layers."""
    found: set[str] = set()
    for prefix, module in model.named_modules():
        if is_norm(module):
            found.update(f"{prefix}.{name}" for name in module.state_dict())
    return frozenset(found)


def layout_of(model: nn.Module, parts: Sequence[Part]) -> Layout:
    """What a strategy may know of the arrays of a model."""
    convolutions = {prefix for prefix, module in model.named_modules() if isinstance(module, nn.modules.conv._ConvNd)}
    return Layout(
        parameters=frozenset(name for name, _ in model.named_parameters()),
        kernels=frozenset(f"{prefix}.weight" for prefix in convolutions),
        follows={part.name: part.follows for part in parts if part.teaches},
    )


@torch.no_grad()
def seed_parameters(model: nn.Module, seed: int) -> None:
    """Set every parameter from its own seeded stream, named by its key; buffers are left as built.

    The scales are those of PyTorch's constructors (He et al. 2015 with a = sqrt(5): uniform within 1/sqrt(fan-in)) for
    matrices and kernels, 1 and 0 for normalisation layers; parameters that belong to no layer with a fan-in get a
    normal distribution of standard deviation 0.02. The global generator of torch is neither read nor reset.
    """
    for prefix, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        weight = own.get("weight")
        for name, parameter in own.items():
            key = f"{prefix}.{name}" if prefix else name
            if is_norm(module):
                parameter.fill_(1.0 if name == "weight" else 0.0)
                continue
            value = torch.empty(parameter.shape, dtype=torch.float32)
            generator = seeds.torch_stream(seed, "init", key)
            if weight is not None and weight.dim() >= 2:
                bound = 1.0 / math.sqrt(max(1, weight[0].numel()))
                value.uniform_(-bound, bound, generator=generator)
            else:
                value.normal_(0.0, 0.02, generator=generator)
            parameter.copy_(value)


def to_arrays(model: nn.Module, keys: Collection[str] | None = None) -> Arrays:
    """Copy the named arrays (all by default) out of a model, to numpy on the host.

    The copies do not share memory with the model, so it may go on training.
    """
    if keys is not None and not keys:
        return {}  # to ask a model for its arrays takes longer than to copy small ones
    found = {name: value.detach() for name, value in tensors(model) if keys is None or name in keys}
    if any(value.device.type != "cpu" for value in found.values()):
        return _fetched(found)
    return {name: value.numpy().copy() for name, value in found.items()}  # sooner than torch's own copies of small ones


def _fetched(values: Mapping[str, Tensor]) -> Arrays:
    """Arrays from another device; it is waited for once for each type, not for each array."""
    there: Arrays = {}
    for names in _by_type(values):
        flat = torch.cat([values[name].reshape(-1) for name in names]).cpu().numpy()
        ends = np.cumsum([values[name].numel() for name in names])[:-1]
        parts = zip(names, np.split(flat, ends), strict=True)
        there |= {name: part.reshape(values[name].shape) for name, part in parts}
    return {name: there[name] for name in values}


def _by_type(values: Mapping[str, Tensor]) -> list[list[str]]:
    names: dict[torch.dtype, list[str]] = {}
    for name, value in values.items():
        names.setdefault(value.dtype, []).append(name)
    return list(names.values())


@torch.no_grad()
def load_arrays(model: nn.Module, arrays: Mapping[str, np.ndarray]) -> None:
    """Copy arrays into the model in place; types are converted, shapes must agree.

    Raises:
        ProtocolError: an array has no place in the model, or another shape.
    """
    own, far = dict(tensors(model)) if arrays else {}, {}
    for name, value in arrays.items():
        target = own.get(name)
        if target is None:
            raise ProtocolError(f"array {name!r} has no place in this model: server and client disagree on the method")
        if tuple(target.shape) != tuple(value.shape):
            raise ProtocolError(f"array {name!r} has shape {tuple(value.shape)}, the model wants {tuple(target.shape)}")
        if target.device.type == "cpu":  # through numpy: torch warns of read-only arrays, as those of a wire are
            np.copyto(target.detach().numpy(), value, casting="unsafe")
        else:
            far[name] = target
    for names in _by_type(far):  # in one go, for each copy to another device waits for it
        flat = torch.cat([torch.from_numpy(arrays[name].copy()).to(far[name].dtype).reshape(-1) for name in names])
        parts = torch.split(flat.to(far[names[0]].device), [far[name].numel() for name in names])
        for name, part in zip(names, parts, strict=True):
            far[name].copy_(part.view(far[name].shape))


def pairs(model: Model, part: Part) -> Iterator[tuple[Tensor, Tensor]]:
    """(follower, followed) for every array of a part that follows others.

    A teacher is a `ModuleDict` whose keys are the parts it follows.
    """
    for name in part.follows:
        yield from zip(_state(model[part.name].get_submodule(name)), _state(model[name]), strict=True)


def _state(module: nn.Module) -> Iterator[Tensor]:
    """Parameters and persistent buffers in the order of `tensors`; those of a module that is there twice, once."""
    for each in module.modules():
        yield from (parameter for parameter in each._parameters.values() if parameter is not None)
        for name, buffer in each._buffers.items():
            if buffer is not None and name not in each._non_persistent_buffers_set:
                yield buffer


@torch.no_grad()
def derive(model: Model, parts: Sequence[Part], keys: Collection[str]) -> None:
    """Rebuild derived parts as exact copies of the parts they follow.

    Args:
        model: changed in place.
        parts: the method's parts.
        keys: the arrays whose share is `derived`; parts without one of them are left alone.
    """
    wanted = {key.partition(".")[0] for key in keys}
    for part in parts:
        if part.name in wanted:
            for follower, followed in pairs(model, part):
                follower.copy_(followed)


@torch.no_grad()
def ema_(model: Model, part: Part, decay: float | Tensor) -> None:
    """Move a teacher towards what it follows: teacher <- decay * teacher + (1 - decay) * student.

    Parameters and floating buffers are averaged, counters are copied.
    """
    for follower, followed in pairs(model, part):
        if follower.is_floating_point():
            follower.lerp_(followed.to(follower.dtype), 1.0 - decay)
        else:
            follower.copy_(followed)


def frozen(parts: Mapping[str, nn.Module]) -> nn.ModuleDict:
    """A teacher for these modules: equal copies that take no gradient."""
    return nn.ModuleDict({name: copy.deepcopy(module) for name, module in parts.items()}).requires_grad_(False)
