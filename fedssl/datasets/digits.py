"""The 1,797 handwritten digits bundled with scikit-learn: 8x8, grey, no download. The default data set."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from sklearn.datasets import load_digits

from fedssl.datasets.base import Data, Dataset
from fedssl.datasets.split import stratified
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
        bundled = load_digits()
        pixels = np.rint(bundled.images * (255 / 16)).astype(np.uint8)
        whole = Dataset(torch.from_numpy(pixels).unsqueeze(1), bundled.target.astype(np.int64))
        train, test = stratified(bundled.target, self.test_fraction, SPLIT_SEED)
        return Data(whole.subset(train), whole.subset(test), tuple(str(digit) for digit in range(10)))
