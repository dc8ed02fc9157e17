"""`fedssl export`: a finished run's encoder as files to publish or to run elsewhere, with a model card."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedssl.errors import ConfigError
from fedssl.export import PretrainedEncoder, describe, load_encoder
from fedssl.export.card import model_card
from fedssl.export.portable import to_onnx
from fedssl.files import array_bytes, read_arrays, write_bytes, write_json, write_text
from fedssl.modalities.pairs import SIDES
from fedssl.report.record import Record
from fedssl.rundir import RunDirectory
from simulations.words import read

FORMATS = ("safetensors", "onnx")
WEIGHTS = "model.safetensors"
USAGE = "fedssl export runs/NAME [--format safetensors|onnx] [--out FOLDER]"


def main(arguments: Sequence[str]) -> int:
    """Write the encoder of one run to a folder, RUN/export by default, and a card beside it.

    Raises:
        ConfigError: a wrong option, or an encoder that the format cannot hold.
        ResumeError: the run has no encoder, or has not ended.
    """
    words = read(arguments, ("format", "out"), USAGE)
    if len(words.rest) != 1:
        raise ConfigError(f"export takes exactly one run directory: {USAGE}")
    kind = words.last("format", FORMATS[0])
    if kind not in FORMATS:
        raise ConfigError(f"--format {kind} is not known: use {' or '.join(FORMATS)}")
    run = RunDirectory(Path(words.rest[0]))
    about = describe(run.path)
    run.read("summary.json")  # refuses a run that has not ended
    privacy, record, encoder = run.read("privacy.json"), Record.read(run), load_encoder(run.path)
    folder = Path(words.last("out", str(run.path / "export")))
    content = {**about, "weights": WEIGHTS, "sha256": _digest(run.path / about["weights"])}
    _own(folder, content["sha256"])
    made = _onnx(encoder) if kind == "onnx" else _weights(run.path / about["weights"])
    for name, data in made.items():  # all of them are there before the first is written
        write_bytes(folder / name, data)
    write_json(folder / "config.json", content)
    files = sorted(path.name for path in folder.iterdir() if path.suffix in (".onnx", ".safetensors"))
    write_text(folder / "README.md", model_card(record, about, encoder.augment.modality, privacy, files))
    print(f"{', '.join(files)}, config.json and a model card: {folder}")
    return 0


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _own(folder: Path, digest: str) -> None:
    """Refuse a folder that holds another encoder: its card would speak for files that are not its own.

    Raises:
        ConfigError: it does.
    """
    if (folder / "config.json").exists():
        try:
            there = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("sha256")
        except (ValueError, AttributeError):
            there = None
        if there != digest:
            raise ConfigError(f"{folder} holds another model: pass an empty folder, --out FOLDER")


def _weights(path: Path) -> Mapping[str, bytes]:
    arrays, _ = read_arrays(path)  # refuses a damaged file
    return {WEIGHTS: array_bytes(arrays, {"format": "pt"})}  # by this word the hub's tools know whose arrays they are


def _onnx(encoder: PretrainedEncoder) -> Mapping[str, bytes]:
    """The ONNX files of an encoder by name: one, or one for each tower of a pair."""
    if encoder.augment.modality != "pairs":
        return {"model.onnx": to_onnx(encoder)}
    found = {}
    for side, shape in zip(SIDES, encoder.shape, strict=True):
        network, augment = getattr(encoder.network, side), getattr(encoder.augment, side)
        found[f"{side}.onnx"] = to_onnx(PretrainedEncoder(network, encoder.dim, augment, tuple(shape)).eval())
    return found
