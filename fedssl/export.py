"""The pretrained encoder as files that need nothing of this run: weights and how to rebuild the network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedssl.build import build
from fedssl.errors import ResumeError
from fedssl.files import read_arrays, write_arrays, write_json
from fedssl.job import Job
from fedssl.model import load_arrays
from fedssl.parts import Arrays


class PretrainedEncoder(nn.Module):
    """A pretrained encoder with its input normalisation: (B, C, H, W) floats in [0, 1] to features (B, D).

    Attributes:
        network: the encoder itself, for fine-tuning.
        dim: D.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, dim: int, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.network, self.dim = network, dim
        self.register_buffer("mean", torch.tensor(mean).reshape(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).reshape(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Features of a batch of images."""
        features: Tensor = self.network((x - self.mean) / self.std)
        return features


def save_encoder(folder: Path, job: Job, channels: int, arrays: Arrays) -> None:
    """Write encoder.safetensors and encoder.json from the arrays of a merged model."""
    encoder = {k.removeprefix("encoder."): v for k, v in arrays.items() if k.startswith("encoder.")}
    augment: Any = job.data.augment
    write_arrays(folder / "encoder.safetensors", encoder)
    write_json(
        folder / "encoder.json",
        {
            "encoder": job.tree["encoder"],
            "channels": channels,
            "input": "float images in [0, 1], shape (batch, channels, height, width)",
            "mean": list(augment.mean),
            "std": list(augment.std),
            "weights": "encoder.safetensors",
        },
    )


def load_encoder(run_dir: str | Path) -> PretrainedEncoder:
    """Rebuild the encoder that a run left behind, in evaluation mode, on the CPU.

    Raises:
        ResumeError: the directory has no encoder, or a damaged one.
    """
    folder = Path(run_dir)
    try:
        about = json.loads((folder / "encoder.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ResumeError(f"{folder} has no encoder.json: pass the directory of a run that has ended") from error
    except json.JSONDecodeError as error:
        raise ResumeError(f"{folder}/encoder.json is damaged: `fedssl resume {folder}` writes it anew") from error
    network, dim = build(about["encoder"], "encoder").make(about["channels"])
    arrays, _ = read_arrays(folder / about["weights"])
    load_arrays(network, arrays)
    return PretrainedEncoder(network, dim, about["mean"], about["std"]).eval()
