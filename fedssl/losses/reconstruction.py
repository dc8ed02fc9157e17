"""Losses that compare a decoder's output with the input it did not see."""

from __future__ import annotations

import torch
from torch import Tensor

from fedssl.errors import ConfigError
from fedssl.losses._checks import check_floating
from fedssl.losses.similarity import wide


def masked_reconstruction(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Takes the squared error of the patches that the encoder did not see (masked autoencoders).

    Per example `mean_{t masked} mean_p (prediction - target)^2`. With as many masked patches in every example, as in
    the paper, the mean over the batch is the paper's mean over all masked patches. Visible patches are not read and may
    hold anything, nan included. 0 means that all masked patches are restored, and the target's mean square that the
    decoder says 0 everywhere (1 for patches normalised to deviation 1, as in the paper's best setting). One example's
    loss reads no other example.

    Args:
        prediction: (B, T, P), the decoder's T patches of P values.
        target: (B, T, P), the input's patches; normalise each patch before the call if that is wanted.
        mask: (B, T), bool, true where the patch was hidden from the encoder.

    Returns:
        (B,), each value >= 0; 0, without a gradient, for an example with nothing masked.

    Raises:
        ConfigError: shapes that do not fit, an empty batch, or a mask that is not bool.

    References:
        He et al. 2022, https://arxiv.org/abs/2111.06377, section 3
    """
    for name, x in (("prediction", prediction), ("target", target)):
        if x.ndim != 3 or x.numel() == 0:
            raise ConfigError(
                f"{name} has the shape {tuple(x.shape)}, but patches are compared one by one and need (B, T, P) with "
                "at least one example, patch and value; cut the input into patches, or skip an empty batch."
            )
        check_floating(name, x)
    if prediction.shape != target.shape:
        raise ConfigError(
            f"prediction has the shape {tuple(prediction.shape)} and target {tuple(target.shape)}, so patches cannot "
            "be paired; let the decoder return every patch at the size of the input's."
        )
    if mask.dtype != torch.bool or mask.shape != target.shape[:2]:
        raise ConfigError(
            f"mask holds {mask.dtype} of the shape {tuple(mask.shape)} beside patches of {tuple(target.shape)}, so it "
            f"does not say which ones were hidden; pass bool of {tuple(target.shape[:2])}, true where hidden."
        )
    error = torch.where(mask.unsqueeze(2), wide(prediction) - wide(target), 0.0)  # (B, T, P)
    return error.square().mean(2).sum(1) / mask.sum(1).clamp(min=1)
