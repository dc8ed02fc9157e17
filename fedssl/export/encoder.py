"""The pretrained encoder as files that need nothing of this run: weights and how to rebuild the network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fedssl.build import build
from fedssl.errors import ResumeError
from fedssl.files import read_arrays, write_arrays, write_json
from fedssl.job import Job
from fedssl.method import Augment
from fedssl.model import load_arrays
from fedssl.parts import Arrays

DESCRIPTIONS = ("encoder.json", "config.json")  # of a run, and of an exported folder


class PretrainedEncoder(nn.Module):
    """A pretrained encoder with its input normalisation: examples as the data set gives them to features (B, D).

    Attributes:
        network: the encoder itself, for fine-tuning.
        dim: D.
        augment: normalises; `augment.reads` says what goes in, such as (B, C, H, W) floats in [0, 1].
        shape: of one example; of pairs, that of each side.
    """

    def __init__(self, network: nn.Module, dim: int, augment: Augment, shape: tuple[Any, ...] = ()) -> None:
        super().__init__()
        self.network, self.dim, self.augment, self.shape = network, dim, augment, shape

    def forward(self, x: Any) -> Tensor:
        """Features of a batch."""
        features: Tensor = self.network(self.augment.plain(x))
        return features


def save_encoder(folder: Path, job: Job, shape: tuple[Any, ...], arrays: Arrays) -> None:
    """Write encoder.safetensors and encoder.json from the arrays of a merged model."""
    encoder = {k.removeprefix("encoder."): v for k, v in arrays.items() if k.startswith("encoder.")}
    augment: Any = job.data.augment
    write_arrays(folder / "encoder.safetensors", encoder)
    write_json(
        folder / "encoder.json",
        {
            "encoder": job.tree["encoder"],
            "shape": list(shape),
            "input": augment.reads,
            "augment": job.tree["data"].get("augment"),
            "weights": "encoder.safetensors",
        },
    )


def describe(folder: Path) -> dict[str, Any]:
    """What encoder.json of a run, or config.json of an exported folder, says of its encoder.

    Raises:
        ResumeError: there is neither, or it is damaged.
    """
    path = next((folder / name for name in DESCRIPTIONS if (folder / name).is_file()), None)
    if path is None:
        raise ResumeError(f"{folder} has no {DESCRIPTIONS[0]}: pass the directory of a run that has ended")
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        known = {key: about[key] for key in ("encoder", "shape", "input", "augment", "weights")}
    except (ValueError, KeyError, TypeError) as error:
        raise ResumeError(f"{path} is damaged: `fedssl resume`, or `fedssl export`, writes it anew") from error
    if Path(str(known["weights"])).name != known["weights"]:
        raise ResumeError(f"{path} names weights outside of its folder ({known['weights']}): it is not trusted")
    return known


def load_encoder(run_dir: str | Path) -> PretrainedEncoder:
    """Rebuild the encoder that a run left behind or `fedssl export` wrote, in evaluation mode, on the CPU.

    Raises:
        ResumeError: the directory has no encoder, or a damaged one.
    """
    folder = Path(run_dir)
    about = describe(folder)
    shape = tuple(about["shape"])
    network, dim = build(about["encoder"], "encoder").make(shape)
    arrays, _ = read_arrays(folder / about["weights"])
    load_arrays(network, arrays)
    return PretrainedEncoder(network, dim, build(about["augment"], "augment"), shape).eval()
