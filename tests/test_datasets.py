"""Data sources: the container, choosing examples, bundled and drawn images, folders, the hub."""

from __future__ import annotations

import hashlib
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fedssl.datasets.base import Data, Dataset
from fedssl.datasets.digits import SPLIT_SEED, Digits
from fedssl.datasets.folder import Folder
from fedssl.datasets.hub import Hub
from fedssl.datasets.pixels import with_channels
from fedssl.datasets.split import balanced_head, stratified
from fedssl.datasets.synthetic import Synthetic
from fedssl.errors import ConfigError
from fedssl.modalities.images import ImageViews

GREY = ImageViews(mean=(0.5,), std=(0.25,))


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def pictures(*shape: int) -> np.ndarray:
    return rng().integers(0, 256, shape).astype(np.uint8)


def save(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


# --- the container


def test_batch_gives_floats_between_0_and_1_of_the_chosen_rows() -> None:
    data = Dataset(torch.arange(2 * 3 * 4, dtype=torch.uint8).view(2, 3, 2, 2) * 11)
    out = data.batch(torch.tensor([1, 0, 1]))
    assert out.dtype == torch.float32
    assert out.shape == (3, 3, 2, 2)
    assert torch.equal(out[0], data.images[1].float() / 255)
    assert (data.channels, data.size, len(data)) == (3, 2, 2)
    assert len(data.to("cpu")) == 2


def test_a_subset_keeps_labels_and_groups_with_their_images() -> None:
    data = Dataset(torch.zeros(4, 1, 2, 2, dtype=torch.uint8), np.arange(4), np.array(list("abcd")))
    part = data.subset(np.array([3, 1]))
    assert part.targets is not None
    assert part.groups is not None
    assert part.targets.tolist() == [3, 1]
    assert part.groups.tolist() == ["d", "b"]
    assert Dataset(data.images).subset(torch.tensor([0])).targets is None


@pytest.mark.parametrize(
    ("images", "targets", "words"),
    [
        (torch.zeros(2, 2, 2, dtype=torch.uint8), None, "shape"),
        (torch.zeros(2, 1, 2, 2), None, "uint8"),
        (torch.zeros(0, 1, 2, 2, dtype=torch.uint8), None, "no image"),
        (torch.zeros(2, 1, 2, 2, dtype=torch.uint8), np.zeros(3, np.int64), "one per example"),
        (torch.zeros(2, 1, 2, 2, dtype=torch.uint8), np.array([0, -1]), "from 0 on"),
        (torch.zeros(2, 1, 2, 2, dtype=torch.uint8), np.zeros(2), "int64"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(images: torch.Tensor, targets: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Dataset(images, targets)


def test_parts_that_differ_and_labels_without_a_name_are_refused() -> None:
    small, large = (Dataset(torch.zeros(1, 1, s, s, dtype=torch.uint8), np.array([1])) for s in (2, 3))
    with pytest.raises(ConfigError, match="one shape"):
        Data(small, large, ("a", "b"))
    with pytest.raises(ConfigError, match="class names"):
        Data(small, small, ("a",))


# --- choosing examples


def test_a_stratified_split_keeps_the_share_of_every_class() -> None:
    targets = np.repeat(np.arange(3), [10, 20, 30])
    train, test = stratified(targets, 0.3, 0)
    assert np.array_equal(np.sort(np.concatenate([train, test])), np.arange(60))
    assert np.bincount(targets[test]).tolist() == [3, 6, 9]
    assert np.array_equal(stratified(targets, 0.3, 0)[1], test)
    assert len(stratified(10, 0.2, 0)[1]) == 2


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 0.01])
def test_a_split_with_an_empty_part_is_refused(fraction: float) -> None:
    with pytest.raises(ConfigError, match="test_fraction"):
        stratified(10, fraction, 0)


def test_a_balanced_head_takes_all_classes_alike_as_far_as_they_go() -> None:
    targets = np.array([0, 0, 0, 0, 1, 1, 2])
    assert balanced_head(targets, 7, 3).tolist() == [0, 4, 6]
    assert balanced_head(targets, 7, 6).tolist() == [0, 1, 2, 4, 5, 6]
    assert balanced_head(targets, 7, None).tolist() == list(range(7))
    assert balanced_head(None, 7, 2).tolist() == [0, 1]
    with pytest.raises(ConfigError, match="limit"):
        balanced_head(targets, 7, 0)


def test_channels_are_repeated_or_become_luma() -> None:
    colour = torch.from_numpy(pictures(5, 3, 4, 4))
    grey = with_channels(colour, 1)
    expected = np.stack([np.asarray(Image.fromarray(image.permute(1, 2, 0).numpy()).convert("L")) for image in colour])
    assert np.abs(grey[:, 0].numpy().astype(int) - expected).max() <= 1
    assert torch.equal(with_channels(grey, 3)[:, 2], grey[:, 0])
    assert with_channels(colour, 3) is colour


# --- bundled and drawn


def test_the_digits_and_their_split_never_change() -> None:
    data = Digits().load()
    assert (len(data.train), len(data.test), data.classes[3]) == (1258, 539, "3")
    assert data.train.images.shape[1:] == (1, 8, 8)
    assert int(data.train.images.max()) == 255
    assert hashlib.sha256(data.test.images.numpy().tobytes()).hexdigest()[:16] == "c176f37e75cdd947"
    assert Digits().augment.channels == data.train.channels


def test_the_digits_are_what_scikit_learn_loads() -> None:
    from sklearn.datasets import load_digits

    theirs = load_digits()
    data = Digits().load()
    for part, rows in zip((data.train, data.test), stratified(theirs.target, 0.3, SPLIT_SEED), strict=True):
        assert np.array_equal(part.targets, theirs.target[rows])
        assert np.array_equal(part.images[:, 0].numpy(), np.rint(theirs.images[rows] * 255 / 16))


@pytest.mark.parametrize(("size", "channels", "classes"), [(32, 3, 10), (9, 1, 20), (20, 3, 2)])
def test_synthetic_images_come_from_their_seed(size: int, channels: int, classes: int) -> None:
    augment = GREY if channels == 1 else ImageViews()
    source = Synthetic(train=300, test=100, size=size, channels=channels, classes=classes, augment=augment)
    one, two = source.load(), source.load()
    assert one.train.images.shape == (300, channels, size, size)
    assert torch.equal(one.train.images, two.train.images)
    assert one.train.targets is not None
    assert one.train.groups is not None
    assert np.bincount(one.train.targets, minlength=classes).min() >= 300 // classes
    assert len(set(one.classes)) == classes
    assert 15 <= len(np.unique(one.train.groups)) <= 20
    other = Synthetic(
        train=300, test=100, size=size, channels=channels, classes=classes, seed=1, augment=augment
    ).load()
    assert not torch.equal(one.train.images, other.train.images)


def test_classes_of_synthetic_images_can_be_told_apart_but_not_from_raw_pixels() -> None:
    data = Synthetic(train=600, test=200, size=16, classes=5).load()
    assert data.train.targets is not None
    assert data.test.targets is not None
    known, asked = (part.images.flatten(1).float() for part in (data.train, data.test))
    nearest = torch.cdist(asked, known).argmin(1).numpy()
    raw = float((data.train.targets[nearest] == data.test.targets).mean())
    # The shape alone: distance from the paper's colour (a corner), moved to its centre of mass.
    shapes = []
    for images in (data.train.images.float(), data.test.images.float()):
        ink = (images - images[:, :, :1, :1]).abs().sum(1)
        ink = (ink / ink.amax((1, 2), keepdim=True) > 0.4).float()
        grid, mass = torch.linspace(-1, 1, 16), ink.sum((1, 2)) + 1e-6
        x, y = (ink * grid).sum((1, 2)) / mass, (ink * grid.view(16, 1)).sum((1, 2)) / mass
        theta = torch.zeros(len(ink), 2, 3)
        theta[:, 0, 0] = theta[:, 1, 1] = 0.7
        theta[:, 0, 2], theta[:, 1, 2] = x, y
        flow = torch.nn.functional.affine_grid(theta, [len(ink), 1, 16, 16], align_corners=False)
        shapes.append(torch.nn.functional.grid_sample(ink.unsqueeze(1), flow, align_corners=False).flatten(1))
    best = torch.cdist(shapes[1], shapes[0]).topk(5, largest=False).indices.numpy()
    votes = np.stack([np.bincount(row, minlength=5) for row in data.train.targets[best]])
    centred = float((votes.argmax(1) == data.test.targets).mean())
    assert raw < 0.6
    assert centred > 0.6


@pytest.mark.parametrize(
    "bad", [{"classes": 21}, {"classes": 1}, {"train": 0}, {"size": 4}, {"channels": 2}, {"channels": 1}]
)
def test_synthetic_numbers_out_of_range_are_refused(bad: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        Synthetic(**bad)


# --- folders


def test_a_folder_with_train_and_test(tmp_path: Path) -> None:
    for part, count in (("train", 3), ("test", 2)):
        for name in ("cat", "dog"):
            for i in range(count):
                save(tmp_path / part / name / f"{i}.png", pictures(10, 20, 3))
    save(tmp_path / "train" / "dog" / "deep" / "9.png", pictures(8, 8))
    data = Folder(str(tmp_path), size=8).load()
    assert data.train.targets is not None
    assert data.test.targets is not None
    assert data.train.images.shape == (7, 3, 8, 8)
    assert data.train.targets.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert data.test.targets.tolist() == [0, 0, 1, 1]
    assert data.classes == ("cat", "dog")
    save(tmp_path / "test" / "owl" / "0.png", pictures(8, 8, 3))
    with pytest.raises(ConfigError, match="owl"):
        Folder(str(tmp_path)).load()


def test_a_folder_of_classes_and_a_flat_one_are_divided_by_a_constant_seed(tmp_path: Path) -> None:
    for i in range(10):
        save(tmp_path / "sorted" / f"class {i % 2}" / f"{i}.jpg", pictures(9, 9, 3))
        save(tmp_path / "flat" / f"{i}.png", pictures(9, 9))
    data = Folder(str(tmp_path / "sorted"), size=9).load()
    assert data.test.targets is not None
    assert data.test.targets.tolist() == [0, 1]
    flat = Folder(str(tmp_path / "flat"), size=9, test_fraction=0.4, augment=GREY).load()
    assert (flat.train.targets, flat.classes, flat.test.images.shape) == (None, (), (4, 1, 9, 9))
    assert torch.equal(flat.test.images, Folder(str(tmp_path / "flat"), 9, 0.4, GREY).load().test.images)


def test_images_are_cropped_at_the_centre_without_distortion(tmp_path: Path) -> None:
    wide = np.zeros((16, 48), np.uint8)
    wide[:, 16:32] = 255
    for i in range(2):
        save(tmp_path / f"{i}.png", wide)
    data = Folder(str(tmp_path), size=16, test_fraction=0.5, augment=GREY).load()
    assert int(data.train.images.min()) == 255


def test_folders_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.root="):
        Folder(str(tmp_path / "absent")).load()
    with pytest.raises(ConfigError, match="no image"):
        Folder(str(tmp_path)).load()
    with pytest.raises(ConfigError, match="size"):
        Folder(str(tmp_path), size=0)
    save(tmp_path / "good.png", pictures(4, 4))
    (tmp_path / "bad.png").write_bytes(b"not an image")
    with pytest.raises(ConfigError, match=r"bad\.png cannot be read"):
        Folder(str(tmp_path)).load()
    save(tmp_path / "cat" / "0.png", pictures(4, 4))
    with pytest.raises(ConfigError, match="beside"):
        Folder(str(tmp_path)).load()


# --- the hub


class FakeColumn:
    names = ("cat", "dog")


class FakePart(list[dict[str, Any]]):
    column_names = ("image", "label")
    features = types.MappingProxyType({"image": None, "label": FakeColumn()})


def fake_hub(monkeypatch: pytest.MonkeyPatch, rows: int = 3) -> None:
    def load_dataset(name: str, split: str) -> FakePart:
        if split not in ("train", "test"):
            raise ValueError(f"Unknown split {split}")
        return FakePart({"image": Image.fromarray(pictures(6, 8, 3)), "label": i % 2} for i in range(rows))

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_the_hub_is_read_by_column(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_hub(monkeypatch)
    data = Hub("owner/name", size=6).load()
    assert data.train.images.shape == (3, 3, 6, 6)
    assert data.train.targets is not None
    assert data.train.targets.tolist() == [0, 1, 0]
    assert data.classes == ("cat", "dog")
    unlabelled = Hub("owner/name", label_column=None, augment=GREY).load()
    assert (unlabelled.train.targets, unlabelled.classes, unlabelled.train.channels) == (None, (), 1)


def test_what_the_hub_does_not_have_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_hub(monkeypatch)
    with pytest.raises(ConfigError, match="no column picture"):
        Hub("owner/name", image_column="picture").load()
    with pytest.raises(ConfigError, match="part valid"):
        Hub("owner/name", test_split="valid").load()
    fake_hub(monkeypatch, rows=0)
    with pytest.raises(ConfigError, match="without images"):
        Hub("owner/name").load()
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"fedssl\[hub\]"):
        Hub("owner/name").load()
