"""A pretrained encoder as ONNX: one file with weights and input normalisation, checked before it is kept."""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from fedssl import seeds
from fedssl.errors import ConfigError
from fedssl.export.encoder import PretrainedEncoder

NEEDS = ("onnx", "onnxscript", "onnxruntime")  # of the extra [onnx]
TOLERANCE = 1e-5  # of a feature, over the largest one where that is above 1
TRACED, CHECKED = 2, (1, 2, 5)  # examples in a batch: the one that is traced, and those that are compared


def to_onnx(encoder: PretrainedEncoder) -> bytes:
    """The encoder as an ONNX model: input `x` (batch, ...) as the data set gives it, output `features` (batch, dim).

    Its features are compared with torch's on three sizes of batches before it is returned.

    Args:
        encoder: of images or time series, in evaluation mode; batches may have any size, one example has `shape`.

    Raises:
        ConfigError: the modality has no fixed input, the extra is not installed, or the file computes something else.
    """
    modality = encoder.augment.modality
    if modality not in ("images", "timeseries"):
        raise ConfigError(
            f"an encoder of {modality} cannot be written as ONNX, whose inputs are arrays of one shape: use "
            "--format safetensors and fedssl.load_encoder"
        )
    _imported()
    batch = torch.from_numpy(_examples(encoder.shape, TRACED))
    with _quiet():
        program = torch.onnx.export(
            encoder,
            (batch,),
            dynamo=True,
            input_names=["x"],
            output_names=["features"],
            dynamic_shapes=({0: "batch"},),
            verbose=False,
        )
    model: Any = program.model_proto  # type: ignore[union-attr]  # with dynamo it is a program
    for part in (model.graph, *model.graph.node, *model.graph.value_info, *model.graph.input, *model.graph.output):
        del part.metadata_props[:]  # stack traces, with the paths of this machine
    content: bytes = model.SerializeToString()
    check_onnx(content, encoder)
    return content


@torch.no_grad()
def check_onnx(content: bytes, encoder: PretrainedEncoder) -> None:
    """Compare an ONNX model with the encoder that it was made from, by onnxruntime on the CPU.

    Raises:
        ConfigError: a feature differs by more than `TOLERANCE`.
    """
    session = importlib.import_module("onnxruntime").InferenceSession(content, providers=["CPUExecutionProvider"])
    for count in CHECKED:
        x = _examples(encoder.shape, count)
        wanted = encoder(torch.from_numpy(x)).numpy()
        (found,) = session.run(None, {"x": x})
        worst = float(np.abs(found - wanted).max()) if found.shape == wanted.shape else np.inf
        if not worst <= TOLERANCE * max(1.0, float(np.abs(wanted).max())):  # a nan is no match either
            raise ConfigError(
                f"the ONNX file differs from the encoder by {worst:.1e} and is not kept: export it with "
                "--format safetensors, and report the encoder"
            )


def _examples(shape: tuple[Any, ...], count: int) -> np.ndarray:
    rng = seeds.stream(0, "export", count)
    return rng.random((count, *shape), dtype=np.float32)


def _imported() -> None:
    """Refuse to go on without the packages that torch's exporter and the check need."""
    for name in NEEDS:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ConfigError(
                f"--format onnx needs {name}, which cannot be imported ({error}): pip install 'fedssl[onnx]', or use "
                "--format safetensors"
            ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """torch's exporter warns of its own calls and of a torchvision that is not there."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
