"""Several data sets as one, and PACS: domains as clients."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedssl import config
from fedssl.datasets.base import Data, Dataset
from fedssl.datasets.digits import Digits
from fedssl.datasets.joined import Joined, fitted
from fedssl.datasets.signals.drawn import SyntheticSignals
from fedssl.datasets.synthetic import Synthetic
from fedssl.errors import ConfigError
from fedssl.job import split
from fedssl.modalities.images import ImageViews

REAL = Path(os.environ.get("FEDSSL_DATA", Path(__file__).parents[2] / "shared" / "data"))


@dataclass(frozen=True)
class Fixed:
    """A source with given classes."""

    classes: tuple[str, ...]
    n: int = 6
    shape: tuple[int, ...] = (1, 5, 5)
    labelled: bool = True
    shade: int = 0

    def load(self) -> Data:
        def part(n: int) -> Dataset:
            targets = np.arange(n) % max(1, len(self.classes)) if self.labelled else None
            return Dataset(torch.full((n, *self.shape), self.shade, dtype=torch.uint8), targets)

        return Data(part(self.n), part(3), self.classes)


def test_sources_become_groups_and_classes_meet_by_name() -> None:
    sources = {
        "zoo": Fixed(("cat", "dog"), 4, shade=10),
        "street": Fixed(("car", "dog", "truck"), 6, (3, 9, 7), shade=20),
        "old": Fixed(("automobile", "wolf"), 2, (3, 4, 4), shade=30),
    }
    data = Joined(sources, size=5, rename={"old": {"automobile": "car", "wolf": "dog"}}).load()
    assert data.classes == ("cat", "dog", "car", "truck")
    assert data.train.groups.tolist() == ["zoo"] * 4 + ["street"] * 6 + ["old"] * 2
    assert data.train.targets.tolist() == [0, 1, 0, 1, 2, 1, 3, 2, 1, 3, 2, 1]
    assert data.train.images.shape == (12, 3, 5, 5)
    assert data.train.images[:, 0, 2, 2].tolist() == [10] * 4 + [20] * 6 + [30] * 2
    assert data.test.groups.tolist() == ["zoo"] * 3 + ["street"] * 3 + ["old"] * 3


def test_labels_are_kept_only_where_every_source_has_them() -> None:
    joined = Joined({"a": Fixed(("x",)), "b": Fixed((), labelled=False)}, size=5).load()
    assert joined.train.targets is None
    assert joined.test.targets is None


@pytest.mark.parametrize(("height", "width"), [(8, 8), (16, 16), (9, 20), (20, 9), (5, 5), (1, 3)])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_fitted_to_one_shape(height: int, width: int, channels: int) -> None:
    ramp = torch.arange(width, dtype=torch.uint8).mul(10).expand(2, 3, height, width)
    out = fitted(ramp, 8, channels)
    assert out.shape == (2, channels, 8, 8)
    assert out.dtype == torch.uint8
    row = out[0, 0, 4].float()
    assert (row.diff() >= 0).all()
    assert row.mean() == pytest.approx((width - 1) * 5, abs=2), "the middle of the image stays in the middle"
    assert fitted(ramp[..., :8], 8, 3) is not None
    same = torch.zeros(2, channels, 8, 8, dtype=torch.uint8)
    assert fitted(same, 8, channels) is same


def test_a_data_set_a_client() -> None:
    small = ("data.sources.second.train=300", "data.sources.second.test=50", "data.size=8", "federation.clients=2")
    job = config.compose(["data=joined", "partition=natural", *small]).job
    data = job.data.load()
    digits = Digits().load()
    assert len(data.classes) == 20
    parts = split(job, data.train)
    assert [len(part) for part in parts] == [len(digits.train), 300]
    assert torch.equal(data.train.images[parts[0]][:, 0], digits.train.images[:, 0])
    with pytest.raises(ConfigError, match="2 groups"):
        split(config.compose(["data=joined", "partition=natural", *small[:3]]).job, data.train)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sources": {}}, "sources is empty"),
        ({"sources": {"a": Digits()}, "size": 0}, "needs pixels"),
        ({"sources": {"a": Digits()}, "rename": {"b": {}}}, "speaks of b"),
        ({"sources": {"a": Digits()}, "rename": {"a": {"ten": "10"}}}, "speaks of class ten"),
        ({"sources": {"a": Digits(), "b": SyntheticSignals()}}, "data.sources.b gives Signals"),
    ],
)
def test_what_cannot_be_joined_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Joined(**options).load()


def test_a_third_source_and_new_names_come_from_the_command_line() -> None:
    third = ("+data@data.sources.third=synthetic", "data.sources.third.classes=2", "data.sources.third.seed=9")
    named = r'+data.rename={second: {plain\ disc: "0"}}'
    source = config.compose(["data=joined", *third, named]).job.data
    assert isinstance(source, Joined)
    assert list(source.sources) == ["first", "second", "third"]
    assert source.sources["third"] == Synthetic(classes=2, seed=9)
    assert source.rename == {"second": {"plain disc": "0"}}
    assert source.augment == ImageViews()
    with pytest.raises(ConfigError, match="second"):
        config.compose(["data=joined", "data.sources.second.clases=3"])


def test_pacs_has_a_domain_a_client() -> None:
    file = REAL / "pacs64_jpeg.npz"
    if not file.is_file():
        pytest.skip(f"no {file.name}; set FEDSSL_DATA to the folder that holds it")
    options = ("data=pacs", f"data.path={file}", "data.limit=400", "partition=natural", "federation.clients=4")
    job = config.compose(options).job
    train = job.data.load().train
    parts = split(job, train)
    assert [np.unique(train.groups[part]).tolist() for part in parts] == [[0], [1], [2], [3]]
    normalised = job.data.augment.plain(train.batch(torch.arange(400)))
    assert normalised.mean((0, 2, 3)).abs().max() < 0.5
