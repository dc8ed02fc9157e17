"""Data sources read from one file: CIFAR without unsafe pickle, .npz, and real files where they are."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fedssl.datasets.cifar import Cifar, unpickle
from fedssl.datasets.npz import Npz
from fedssl.errors import ConfigError
from fedssl.modalities.images import ImageViews

GREY = ImageViews(mean=(0.5,), std=(0.25,))
REAL = Path(os.environ.get("FEDSSL_DATA", Path(__file__).parents[2] / "shared" / "data"))


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def pictures(*shape: int) -> np.ndarray:
    return rng().integers(0, 256, shape).astype(np.uint8)


# --- CIFAR


def cifar_files(variant: int, rows: int = 4) -> dict[str, dict[str, Any]]:
    images = pictures(6, rows, 3072)
    if variant == 10:
        files = {f"data_batch_{i}": {"data": images[i], "labels": [i, 9, 0, 1]} for i in range(1, 6)}
        files["test_batch"] = {"data": images[0], "labels": [3, 3, 3, 3]}
        files["batches.meta"] = {"label_names": [f"name {i}" for i in range(10)]}
        return files
    return {
        "train": {"data": images[1], "fine_labels": [99, 0, 1, 2], "coarse_labels": [0] * 4},
        "test": {"data": images[0], "fine_labels": [5] * 4},
        "meta": {"fine_label_names": [f"name {i}" for i in range(100)]},
    }


@pytest.mark.parametrize("variant", [10, 100])
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("form", ["folder", "parent", "archive", "archive in folder"])
def test_cifar_is_read_from_its_archive_and_its_folder(tmp_path: Path, variant: int, protocol: int, form: str) -> None:
    folder = tmp_path / ("cifar-10-batches-py" if variant == 10 else "cifar-100-python")
    folder.mkdir()
    files = cifar_files(variant)
    for name, table in files.items():
        (folder / name).write_bytes(pickle.dumps(table, protocol=protocol))
    root = {"folder": folder, "parent": tmp_path}.get(form)
    if root is None:
        archive = tmp_path / f"cifar-{variant}-python.tar.gz"
        with tarfile.open(archive, "w:gz") as tar:
            tar.add(folder, arcname=folder.name)
        for file in folder.iterdir():
            file.unlink()
        root = archive if form == "archive" else tmp_path
    data = Cifar(str(root), variant).load()
    assert data.train.images.shape == (20 if variant == 10 else 4, 3, 32, 32)
    first = files["data_batch_1" if variant == 10 else "train"]["data"][0]
    assert torch.equal(data.train.images[0].flatten(), torch.from_numpy(first))
    assert data.train.targets is not None
    assert data.train.targets[:3].tolist() == ([1, 9, 0] if variant == 10 else [99, 0, 1])
    assert data.classes[7] == "name 7"


def test_the_form_that_python_2_wrote_is_read() -> None:
    pixels = bytes(range(6))
    data = (
        b"\x80\x02}(U\x04datacnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
        b"(K\x01K\x02K\x03\x86cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89U\x06" + pixels + b"tbU\x06labels](K\x03K\x04eu."
    )
    found = unpickle(data, "data_batch_1")
    assert found["labels"] == [3, 4]
    assert found["data"].tolist() == [[0, 1, 2], [3, 4, 5]]


class Malicious:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_pickle_that_names_code_is_refused_and_runs_nothing(tmp_path: Path, protocol: int) -> None:
    mark = tmp_path / "mark"
    for code in (Malicious(os.mkdir, str(mark)), Malicious(eval, "1"), Malicious(getattr, "text", "upper")):
        with pytest.raises(ConfigError, match="could be code"):
            unpickle(pickle.dumps({"data": code}, protocol=protocol), "data_batch_1")
    assert not mark.exists()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not a pickle",
        pickle.dumps([1, 2]),
        pickle.dumps({"data": np.zeros(2000, np.uint8)}, protocol=2)[:900],
        pickle.dumps({"data": np.array([{}], dtype=object)}, protocol=2),
    ],
)
def test_a_damaged_pickle_is_refused(data: bytes) -> None:
    with pytest.raises(ConfigError, match="fetch the archive"):
        unpickle(data, "data_batch_1")


def test_cifar_that_is_missing_or_incomplete_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.root="):
        Cifar(str(tmp_path / "absent")).load()
    with pytest.raises(ConfigError, match="CIFAR-20"):
        Cifar(str(tmp_path), 20)
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"not an archive")
    with pytest.raises(ConfigError, match="archive"):
        Cifar(str(tmp_path)).load()
    files = cifar_files(100)
    files["train"]["data"] = np.zeros((4, 10), np.uint8)
    for name, table in files.items():
        (tmp_path / name).write_bytes(pickle.dumps(table))
    with pytest.raises(ConfigError, match="3072"):
        Cifar(str(tmp_path), 100).load()


# --- npz


def npz(path: Path, **arrays: Any) -> str:
    np.savez(path / "file.npz", **arrays)
    return str(path / "file.npz")


def packed(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    blobs = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=100, subsampling=0)
        blobs.append(buffer.getvalue())
    return np.frombuffer(b"".join(blobs), np.uint8), np.cumsum([0, *map(len, blobs)])


@pytest.mark.parametrize("names", [("train_images", "train_labels", "test_images", "test_labels"), tuple("xyXY")])
@pytest.mark.parametrize(("shape", "view"), [((8, 8, 3), "nhwc"), ((3, 8, 8), "nchw"), ((8, 8), "nhw")])
def test_npz_reads_the_usual_names_and_layouts(tmp_path: Path, names: tuple[str, ...], shape: Any, view: str) -> None:
    if len(names[0]) == 1:
        names = ("x_train", "y_train", "x_test", "y_test")
    images = pictures(6, *shape)
    labels = np.array([[0], [1], [2], [0], [1], [2]], np.uint8)
    path = npz(tmp_path, **dict(zip(names, (images, labels, images[:3], labels[:3]), strict=True)))
    data = Npz(path, augment=GREY if view == "nhw" else ImageViews()).load()
    first = {
        "nhwc": images.transpose(0, 3, 1, 2) if images.ndim == 4 else images,
        "nchw": images,
        "nhw": images[:, None],
    }
    assert np.array_equal(data.train.images.numpy(), first[view])
    assert data.train.targets is not None
    assert data.train.targets.tolist() == [0, 1, 2, 0, 1, 2]
    assert (len(data.test), data.classes) == (3, ("0", "1", "2"))
    assert len(Npz(path, limit=3).load().train) == 3


def test_npz_without_a_test_part_holds_out_a_fifth_of_each_class(tmp_path: Path) -> None:
    labels = np.repeat(np.arange(2), 10)
    path = npz(tmp_path, images=pictures(20, 4, 4), labels=labels, class_names=np.array(["cat", "dog"]))
    data = Npz(path).load()
    assert data.classes == ("cat", "dog")
    assert data.test.targets is not None
    assert data.test.targets.tolist() == [0, 0, 1, 1]
    assert data.train.images.shape == (16, 3, 4, 4)  # grey, repeated: three means


def test_npz_without_labels(tmp_path: Path) -> None:
    data = Npz(npz(tmp_path, images=pictures(10, 4, 4, 3))).load()
    assert (data.train.targets, data.classes, len(data.test)) == (None, (), 2)


def test_npz_reads_packed_images_with_their_groups(tmp_path: Path) -> None:
    ramp = np.linspace(0, 255, 16).astype(np.uint8)
    images = np.stack([np.broadcast_to((ramp // (i + 1))[:, None, None], (16, 16, 3)) for i in range(10)])
    jpeg, offsets = packed(images)
    labels = np.arange(10) % 2
    path = npz(tmp_path, jpeg=jpeg, offsets=offsets, labels=labels, domains=np.arange(10) % 5)
    data = Npz(path, augment=GREY).load()
    assert data.train.groups is not None
    assert data.train.images.shape == (8, 1, 16, 16)
    whole = np.concatenate([data.train.images[:, 0], data.test.images[:, 0]]).astype(int)
    error = np.abs(whole[:, None] - images[None, :, :, :, 0]).max((2, 3)).min(1)
    assert error.max() <= 3
    assert np.array_equal(Npz(path, groups="domains").load().train.groups, data.train.groups)
    with pytest.raises(ConfigError, match="no array writers"):
        Npz(path, groups="writers").load()
    test_jpeg, test_offsets = packed(images[:4])
    path = npz(
        tmp_path,
        train_jpeg=jpeg,
        train_offsets=offsets,
        train_labels=labels,
        test_jpeg=test_jpeg,
        test_offsets=test_offsets,
        test_labels=labels[:4],
    )
    data = Npz(path, limit=6).load()
    assert (len(data.train), len(data.test), data.train.channels) == (6, 4, 3)


def test_npz_spreads_rows_of_several_grey_images_and_keeps_the_given_division(tmp_path: Path) -> None:
    images = pictures(4, 5, 8, 8)
    path = npz(
        tmp_path,
        images=images,
        labels=np.array([0, 1, 2, 3], np.uint8),
        speakers=np.array([7, 8, 7, 8]),
        is_test=np.array([True, False, False, False]),
    )
    data = Npz(path, augment=GREY).load()
    assert data.train.targets is not None
    assert data.train.groups is not None
    assert (len(data.train), len(data.test)) == (15, 5)
    assert data.train.targets.tolist() == [1] * 5 + [2] * 5 + [3] * 5
    assert set(data.train.groups[:5]) == {8}
    assert np.array_equal(data.test.images[:, 0].numpy(), images[0])


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"signals": np.zeros((2, 3))}, "holds signals"),
        ({"images": np.zeros((10, 4, 4))}, "uint8"),
        ({"images": pictures(10, 4, 6, 2)}, "shape"),
        ({"images": pictures(10, 4, 4), "labels": np.zeros(3, np.int64)}, "one per row"),
        ({"images": pictures(10, 4, 4), "labels": np.zeros(10)}, "whole number"),
        ({"train_images": pictures(0, 4, 4), "test_images": pictures(2, 4, 4)}, "no image"),
        ({"jpeg": pictures(10), "labels": np.zeros(1, int)}, "offsets"),
        ({"jpeg": pictures(10), "offsets": np.array([0, 4, 99])}, "offsets"),
        ({"jpeg": pictures(10), "offsets": np.array([0, 4, 5, 6, 8, 10])}, "decoded"),
        ({"images": np.array([{}], dtype=object)}, "pickle"),
    ],
)
def test_npz_that_does_not_fit_is_refused(tmp_path: Path, arrays: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Npz(npz(tmp_path, **arrays)).load()


def test_npz_that_is_missing_or_another_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.path="):
        Npz(str(tmp_path / "absent.npz")).load()
    other = tmp_path / "other.npz"
    for content in (b"text", b"PK\x03\x04broken"):
        other.write_bytes(content)
        with pytest.raises(ConfigError, match="cannot be read"):
            Npz(str(other)).load()
    np.save(tmp_path / "array.npy", np.zeros(3))
    with pytest.raises(ConfigError, match="cannot be read"):
        Npz(str(tmp_path / "array.npy")).load()


# --- real files


@pytest.mark.parametrize(
    ("name", "shape", "classes", "groups"),
    [
        ("cifar10_small", (3, 32, 32), 10, None),
        ("cifar10_jpeg", (3, 32, 32), 10, None),
        ("mnist", (1, 28, 28), 10, None),
        ("pacs64_jpeg", (3, 64, 64), 7, 4),
        ("spoken_written_digits", (1, 28, 28), 10, 6),
    ],
)
def test_real_files_load(name: str, shape: tuple[int, ...], classes: int, groups: int | None) -> None:
    file = REAL / f"{name}.npz"
    if not file.is_file():
        pytest.skip(f"no {name}.npz; set FEDSSL_DATA to the folder that holds it")
    data = Npz(str(file), limit=500, augment=GREY if shape[0] == 1 else ImageViews()).load()
    assert data.train.images.shape == (500, *shape)
    assert len(data.classes) == classes
    assert data.train.targets is not None
    assert np.bincount(data.train.targets).tolist() == pytest.approx([500 / classes] * classes, abs=1)
    assert (None if data.test.groups is None else len(np.unique(data.test.groups))) == groups
