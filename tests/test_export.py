"""`fedssl export`: files that compute what the run's encoder does, and a card that says what the run's files say."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
import yaml
from conftest import execute, tiny
from torch import nn

import fedssl
from fedssl import config
from fedssl.errors import ConfigError, ResumeError
from fedssl.export import PretrainedEncoder
from fedssl.export.portable import check_onnx, to_onnx
from fedssl.modalities.encoders import Conv4, ResNet18
from fedssl.modalities.encoders1d import Conv1d
from fedssl.modalities.images import ImageViews
from fedssl.modalities.timeseries import TimeSeriesViews
from simulations.cli import answer

CLAIM = {
    "unit": "record",
    "epsilon": 8.0,
    "delta": 1e-5,
    "says": "ε = 8.00 at δ = 1e-05 for one record, against the server",
    "not_covered": ["what is measured on the server", "copies of a record"],
}


def finished(folder: Path, *options: str) -> Path:
    last = ("federation.rounds=1", f"out={folder}", "name=run", "evaluate.final=true", "evaluate.repeats=1", *options)
    return execute(config.compose(tiny(*last))).path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with probes, and the claim of a private one, whose accounting takes longer than the run."""
    path = finished(tmp_path_factory.mktemp("runs"), "method=byol", "method.norm=layer")
    (path / "privacy.json").write_text(json.dumps(CLAIM))
    return path


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both formats in one folder."""
    out = tmp_path_factory.mktemp("exported") / "model"
    assert answer(["export", str(run), "--out", str(out)]) == 0
    assert answer(["export", str(run), "--format", "onnx", "--out", str(out)]) == 0
    return out


def of_images(norm: str = "group", width: int = 4) -> PretrainedEncoder:
    network, dim = Conv4(width=width, dim=8, norm=norm).make((1, 8, 8))
    return PretrainedEncoder(network, dim, ImageViews(mean=(0.3,), std=(0.4,)), (1, 8, 8)).eval()


def of_series(normalise: str) -> PretrainedEncoder:
    network, dim = Conv1d(width=4, dim=8).make((2, 32))
    views = TimeSeriesViews(normalise=normalise, mean=(2.0,), std=(3.0,))
    return PretrainedEncoder(network, dim, views, (2, 32)).eval()


def features(content: bytes, x: torch.Tensor) -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": x.numpy()})
    return np.asarray(found)


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert answer(["export", *words]) == 2
    said = capsys.readouterr().err.strip()
    assert "\n" not in said
    return said


def test_the_files_give_the_features_of_the_run(run: Path, exported: Path) -> None:
    x = torch.rand(7, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        wanted = fedssl.load_encoder(run)(x)
        again = fedssl.load_encoder(exported)(x)
    assert torch.equal(again, wanted)
    assert wanted.std() > 1e-3
    np.testing.assert_allclose(features((exported / "model.onnx").read_bytes(), x), wanted.numpy(), atol=1e-5, rtol=0)
    assert sorted(path.name for path in exported.iterdir()) == [
        *("README.md", "config.json", "model.onnx", "model.safetensors"),
    ]
    assert str(Path(fedssl.__file__).parent).encode() not in (exported / "model.onnx").read_bytes(), "no local paths"


def test_the_card_says_what_the_run_says(run: Path, exported: Path) -> None:
    text = (exported / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    assert yaml.safe_load(head)["license"] == "unknown"
    summary, privacy, manifest = (
        json.loads((run / f"{name}.json").read_text()) for name in ("summary", "privacy", "manifest")
    )
    for value in (
        f"{100 * summary['linear_accuracy']:.1f} % | {100 * summary['random_encoder_linear_accuracy']:.1f} %",
        privacy["says"],
        f"Unit: {privacy['unit']}",
        manifest["split"]["fingerprint"],
        "| method | BYOL |",
        "| strategy | FedAvg |",
        "| rounds | 1 |",
        "| encoder | 12 |",
        "load_encoder",
        "onnxruntime",
        *privacy["not_covered"],
    ):
        assert value in body, value
    assert str(run) not in text


def test_without_a_claim_the_card_says_none(tmp_path: Path) -> None:
    path = finished(tmp_path, "evaluate.final=false")
    assert answer(["export", str(path)]) == 0
    text = (path / "export" / "README.md").read_text()
    assert "None is claimed" in text
    assert "linear probe" not in text, "it was not measured"
    assert "ε" not in text
    assert "onnx" not in text


@pytest.mark.parametrize("normalise", [pytest.param("each"), pytest.param("constants", marks=pytest.mark.slow)])
def test_series_are_normalised_inside(normalise: str) -> None:
    encoder = of_series(normalise)
    x = 2 + 3 * torch.randn(4, 2, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = encoder(x).numpy()
    np.testing.assert_allclose(features(to_onnx(encoder), x), wanted, atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("encoder", [Conv4(norm="batch"), ResNet18(width=8), ResNet18(width=8, norm="batch")])
def test_other_networks(encoder: Conv4 | ResNet18) -> None:
    network, dim = encoder.make((3, 16, 16))
    whole = PretrainedEncoder(network, dim, ImageViews(), (3, 16, 16)).eval()
    x = torch.rand(3, 3, 16, 16)
    with torch.no_grad():
        wanted = whole(x).numpy()
    np.testing.assert_allclose(features(to_onnx(whole), x), wanted, atol=1e-5 * max(1, np.abs(wanted).max()), rtol=0)


def test_another_network_is_not_taken_for_this_one(exported: Path) -> None:
    encoder = fedssl.load_encoder(exported)
    content = (exported / "model.onnx").read_bytes()
    check_onnx(content, encoder)
    with torch.no_grad():
        for parameter in encoder.network.parameters():
            parameter.mul_(1.001)
    with pytest.raises(ConfigError, match="differs from the encoder by"):
        check_onnx(content, encoder)


def test_a_file_that_differs_is_not_kept(
    run: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = onnx.load(exported / "model.onnx")
    weight = next(array for array in model.graph.initializer if len(array.dims) == 4)
    weight.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(weight), weight.name))
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: SimpleNamespace(model_proto=model))
    said = refused(capsys, str(run), "--format", "onnx", "--out", str(tmp_path / "out"))
    assert "differs from the encoder by" in said
    assert not (tmp_path / "out").exists()


def test_refusals_are_one_sentence(
    run: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "use safetensors or onnx" in refused(capsys, str(run), "--format", "tf")
    assert "exactly one run" in refused(capsys)
    assert "needs a value" in refused(capsys, str(run), "--format")
    assert "not an option" in refused(capsys, str(run), "--onnx")
    assert "has ended" in refused(capsys, str(tmp_path))
    begun = tmp_path / "begun"
    shutil.copytree(run, begun)
    (begun / "summary.json").unlink()
    assert "has not ended" in refused(capsys, str(begun))
    other = tmp_path / "other"
    shutil.copytree(exported, other)
    (other / "config.json").write_text("{}")
    before = {path.name: path.read_bytes() for path in other.iterdir()}
    assert "holds another model" in refused(capsys, str(run), "--out", str(other))
    assert {path.name: path.read_bytes() for path in other.iterdir()} == before
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    said = refused(capsys, str(run), "--format", "onnx", "--out", str(tmp_path / "none"))
    assert "pip install 'fedssl[onnx]'" in said
    assert not (tmp_path / "none").exists()


def test_graphs_are_refused_and_weights_stay_inside(exported: Path, tmp_path: Path) -> None:
    class Graphs:
        modality = "graphs"

    with pytest.raises(ConfigError, match="an encoder of graphs cannot be written as ONNX"):
        to_onnx(PretrainedEncoder(nn.Identity(), 1, Graphs()))  # type: ignore[arg-type]
    about = json.loads((exported / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**about, "weights": str(exported / "model.safetensors")}))
    with pytest.raises(ResumeError, match="outside of its folder"):
        fedssl.load_encoder(tmp_path)


@pytest.mark.slow
def test_a_pair_is_two_files(tmp_path: Path) -> None:
    options = [o for o in tiny("method=clip", modality="pairs") if not o.startswith("evaluate.final")]
    path = execute(config.compose([*options, f"out={tmp_path}", "name=pairs", "federation.rounds=1"])).path
    out = tmp_path / "out"
    assert answer(["export", str(path), "--format", "onnx", "--out", str(out)]) == 0
    whole = fedssl.load_encoder(path)
    for at, side in enumerate(("first", "second")):
        x = torch.rand(3, *whole.shape[at])
        with torch.no_grad():
            wanted = getattr(whole.network, side)(getattr(whole.augment, side).plain(x)).numpy()
        np.testing.assert_allclose(features((out / f"{side}.onnx").read_bytes(), x), wanted, atol=1e-5, rtol=0)
