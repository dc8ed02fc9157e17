"""Two ways to take the same steps faster: another layout of feature maps in memory, and compiled networks."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fedssl.errors import ConfigError
from fedssl.model import Model


def accelerate(model: Model, *, channels_last: bool = False, compiled: bool = False) -> None:
    """Prepare a model, in place, for how its steps are to be taken; free once it is done. Names of arrays stay.

    Args:
        model: all its parts.
        channels_last: keep kernels, and so feature maps, with the channels innermost. GPUs multiply half-precision
            matrices from there; values differ by rounding.
        compiled: let torch fuse the forward and backward pass of each part when it is first called, which takes
            seconds to minutes for each shape of its input; values differ by rounding.

    Raises:
        ConfigError: there is no compiler for this.
    """
    if channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch types it for tensors only
    for part in model.values():
        if compiled and part._compiled_call_impl is None:
            _need_compiler(model)
            part._compiled_call_impl = _compiled(part)
        elif not compiled and part._compiled_call_impl is not None:
            part._compiled_call_impl = None  # a worker's model may serve a job that does not compile


def _need_compiler(model: Model) -> None:
    on_cpu = next(model.parameters()).device.type == "cpu"
    if on_cpu and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))):
        raise ConfigError("local.compiled=true needs a C++ compiler, and there is none here: install g++, or leave it")


def _compiled(part: nn.Module) -> Callable[..., Any]:
    """What `part.compile()` sets, but of the whole part: that leaves the outermost of torch's own modules out."""

    def call(*inputs: Any) -> Any:
        return part._call_impl(*inputs)  # type: ignore[no-untyped-call]  # torch leaves it untyped

    call.__code__ = call.__code__.replace()  # of its own, for torch counts by it how often something is compiled anew
    found: Callable[..., Any] = torch.compile(call)
    return found
