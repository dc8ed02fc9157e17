"""The 1,797 handwritten digits bundled with scikit-learn: 8x8, grey, no download. The default data set."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from fedssl.datasets.base import Data, Dataset
from fedssl.datasets.split import stratified
from fedssl.errors import ConfigError
from fedssl.modalities.images import ImageViews

SPLIT_SEED = 20240229  # of the data set: every run has the same test set

VIEWS = ImageViews(
    crop=(0.6, 1.0),
    rotation=15.0,
    translate=0.06,
    flip=0.0,
    jitter=0.8,
    saturation=0.0,
    hue=0.0,
    grey=0.0,
    noise=0.05,
    local_crop=(0.3, 0.6),
    padding="zeros",
    mean=(0.305,),
    std=(0.376,),
)


@dataclass(frozen=True)
class Digits:
    """Handwritten digits, 8x8, grey values 0-16 scaled to 0-255, ten classes.

    Args:
        test_fraction: share of every class held out, strictly between 0 and 1.
        augment: how views are drawn; digits are never mirrored.

    References:
        Alpaydin and Kaynak 1998, Optical Recognition of Handwritten Digits, UCI (the test part, as in scikit-learn).
    """

    test_fraction: float = 0.3
    augment: ImageViews = VIEWS

    def load(self) -> Data:
        """Reads the bundled file and divides it, always in the same way."""
        rows = np.loadtxt(_bundled(), delimiter=",", dtype=np.int64)  # 64 pixels and the digit
        pixels = np.rint(rows[:, :64].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
        digits = rows[:, 64].copy()
        whole = Dataset(torch.from_numpy(pixels).unsqueeze(1), digits)
        train, test = stratified(digits, self.test_fraction, SPLIT_SEED)
        return Data(whole.subset(train), whole.subset(test), tuple(str(digit) for digit in range(10)))


def _bundled() -> Path:
    """Scikit-learn's file, found without importing scikit-learn, which takes seconds in each process of a client."""
    spec = find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise ConfigError("data=digits comes with scikit-learn, which is not installed: pip install scikit-learn")
    return Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz"
