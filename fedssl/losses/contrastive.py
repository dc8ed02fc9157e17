"""Losses that contrast an example's positive with other candidates: a softmax over similarities."""

from __future__ import annotations

import torch
from torch import Tensor

from fedssl.errors import ConfigError
from fedssl.losses._checks import check_embeddings, check_floating, check_negatives, check_pair, check_temperature
from fedssl.losses.similarity import cross_entropies, diagonal, product, ready_for, unit, wide


def info_nce(
    anchor: Tensor,
    positive: Tensor,
    negatives: Tensor | None = None,
    *,
    temperature: float | Tensor,
    similarity: str = "cosine",
) -> Tensor:
    """Contrasts each anchor's positive with K negatives: `-log softmax` of the positive among 1 + K candidates.

    0 means that the positive is certain, `log(1 + K)` that all candidates look alike (collapse, or no learning yet).
    Gradients flow into every argument: detach a queue or a teacher's output before the call.

    Args:
        anchor: (B, D).
        positive: (B, D), row i belongs to anchor i.
        negatives: (K, D) shared by all anchors, or (B, K, D) own negatives of each; K may be 0. None takes the other
            positives of the batch: row i has the candidates `positive[j]`, so K = B - 1, and a batch of one example has
            the single candidate and the loss 0.
        temperature: > 0; logits are similarity / temperature. Usual values are 0.05 to 0.5; 0.01 is stable. A 0-d
            tensor may be adapted or learned: it lies on the embeddings' device, and its value is not checked.
        similarity: "cosine", in which a zero vector has similarity 0 with everything, or "dot".

    Returns:
        (B,), each value >= 0.

    Raises:
        ConfigError: shapes that do not fit, an empty batch, an unknown similarity or a temperature that is not above 0.

    References:
        van den Oord et al. 2018, https://arxiv.org/abs/1807.03748; He et al. 2020 (queue), https://arxiv.org/abs/1911.05722
    """
    check_pair("anchor", anchor, "positive", positive)
    check_temperature(temperature)
    if negatives is not None:
        check_negatives(negatives, anchor)
    ready = ready_for(similarity)
    anchor, positive = ready(anchor), ready(positive)
    if negatives is None:
        logits = product(anchor / temperature, positive.T)  # (B, B), the positive of row i in column i
        return -torch.log_softmax(logits, dim=1).diagonal()
    negatives = ready(negatives)
    if negatives.ndim == 2:
        against = product(anchor, negatives.T)  # (B, K)
    else:
        against = product(negatives, anchor.unsqueeze(2)).squeeze(2)  # (B, K, D) x (B, D, 1) -> (B, K)
    own = (anchor * positive).sum(1, keepdim=True)  # (B, 1)
    logits = torch.cat([own, against], dim=1) / temperature  # (B, 1 + K)
    return -torch.log_softmax(logits, dim=1)[:, 0]


def nt_xent(
    z1: Tensor,
    z2: Tensor,
    negatives: Tensor | None = None,
    *,
    temperature: float | Tensor,
    similarity: str = "cosine",
) -> Tensor:
    """Contrasts the two views of each example with the 2B - 2 other views of the batch (SimCLR).

    A view never is its own candidate: the diagonal is masked, not multiplied by 0, which would leave `exp(0)` in every
    denominator and matter most for the small batches of small clients. 0 means that all pairs are found, `log(2B - 1)`
    that all views look alike. A batch of one example has one candidate and the loss 0.

    Args:
        z1: (B, D), first view.
        z2: (B, D), second view of the same examples.
        negatives: (K, D), more candidates of every view, none of them a positive; rows of zeros are places that hold
            none and count for nothing.
        temperature: > 0, or a 0-d tensor; logits are similarity / temperature.
        similarity: "cosine", in which a zero vector has similarity 0 with everything, or "dot".

    Returns:
        (B,), each value >= 0: the mean of the directions z1 -> z2 and z2 -> z1.

    Raises:
        ConfigError: shapes that do not fit, an empty batch, an unknown similarity or a temperature that is not above 0.

    References:
        Chen et al. 2020, https://arxiv.org/abs/2002.05709
    """
    check_pair("z1", z1, "z2", z2)
    check_temperature(temperature)
    b = len(z1)
    ready = ready_for(similarity)
    z = torch.cat([ready(z1), ready(z2)])  # (2B, D)
    logits = product(z / temperature, z.T)  # (2B, 2B)
    logits = logits.masked_fill(diagonal(logits), -torch.inf)
    if negatives is not None:
        check_negatives(negatives, z1)
        against = product(z / temperature, ready(negatives).T)  # (2B, K)
        logits = torch.cat([logits, against.masked_fill((negatives == 0).all(1), -torch.inf)], dim=1)
    partner = torch.arange(2 * b, device=z.device).roll(b)  # row i of z1 has column B + i, of z2 column i
    both = cross_entropies(logits, partner)
    return (both[:b] + both[b:]) / 2


def clip(a: Tensor, b: Tensor, *, temperature: float | Tensor) -> Tensor:
    """Contrasts two modalities of the same examples in both directions (CLIP): symmetric InfoNCE.

    Row i of `a` finds its partner among all rows of `b`, and row i of `b` among all rows of `a`; rows of one modality
    are not each other's candidates, which is the difference to `nt_xent`. 0 means that all pairs are found, `log(B)`
    that all candidates look alike. A batch of one example has the loss 0.

    Args:
        a: (B, D), embeddings of one modality.
        b: (B, D), embeddings of the other, in the same order.
        temperature: > 0; logits are cosine / temperature. CLIP learns it, starting at 0.07 and kept above 0.01: pass a
            0-d tensor, gradients flow into it.

    Returns:
        (B,), each value >= 0: the mean of the directions a -> b and b -> a.

    Raises:
        ConfigError: shapes that do not fit, an empty batch or a temperature that is not above 0.

    References:
        Radford et al. 2021, https://arxiv.org/abs/2103.00020, figure 3
    """
    check_pair("a", a, "b", b)
    check_temperature(temperature)
    logits = product(unit(a) / temperature, unit(b).T)  # (B, B)
    forth, back = (torch.log_softmax(logits, dim=dim).diagonal() for dim in (1, 0))
    return -(forth + back) / 2


def instance_discrimination(anchor: Tensor, bank: Tensor, index: Tensor, *, temperature: float | Tensor) -> Tensor:
    """Classifies each example as itself among the N examples of a memory bank: `-log softmax` over all N keys.

    A linear classifier with one class an example, whose weights are the stored keys at length 1 and whose bias is 0. 0
    means that every example is recognised, `log(N)` that all keys look alike.

    Args:
        anchor: (B, D).
        bank: (N, D), one key an example, N >= 1; detached by the caller. A key of zeros has similarity 0.
        index: (B,), int64, the bank's row of each anchor, in [0, N). It is the caller's promise: a check would wait for
            the device.
        temperature: > 0; logits are cosine / temperature. 0.07 in the paper.

    Returns:
        (B,), each value >= 0.

    Raises:
        ConfigError: shapes that do not fit, an empty batch or bank, an index that is not int64, or a temperature that
            is not above 0.

    References:
        Wu et al. 2018, https://arxiv.org/abs/1805.01978, equation 2, without its noise-contrastive estimate
    """
    check_embeddings("anchor", anchor)
    check_embeddings("bank", bank)
    check_temperature(temperature)
    if bank.shape[1] != anchor.shape[1]:
        raise ConfigError(
            f"bank has the shape {tuple(bank.shape)} beside anchors of {tuple(anchor.shape)}, so they cannot be "
            f"compared; make the bank with the projector's width, (N, {anchor.shape[1]})."
        )
    if index.dtype != torch.int64 or index.shape != anchor.shape[:1]:
        raise ConfigError(
            f"index holds {index.dtype} of the shape {tuple(index.shape)}, but it names each anchor's row of the bank; "
            f"pass int64 of ({len(anchor)},)."
        )
    logits = product(unit(anchor) / temperature, unit(bank).T)  # (B, N)
    return -torch.log_softmax(logits, dim=1).gather(1, index.unsqueeze(1)).squeeze(1)


def negative_weights(scores: Tensor, *, temperature: float | Tensor) -> Tensor:
    """Gives each negative's share of the push in InfoNCE's gradient: `softmax(scores / temperature)` over negatives.

    The gradient of an anchor's InfoNCE by the similarity of its negative k is `(1 - p) / temperature * weight_k`, p the
    softmax of the positive. A low temperature gives the hardest negative all of the weight, a high one gives each
    `1 / K`.

    Args:
        scores: (B, K), similarities of each anchor to its negatives, before the division; -inf has weight 0.
        temperature: > 0.

    Returns:
        (B, K), each row >= 0 with the sum 1; empty when K is 0.

    Raises:
        ConfigError: scores that are not (B, K) floating-point numbers, or a temperature that is not above 0.

    References:
        Wang & Liu 2021, https://arxiv.org/abs/2012.09740, section 3
    """
    if scores.ndim != 2:
        raise ConfigError(
            f"scores has the shape {tuple(scores.shape)}, but weights are shared out among the negatives of each "
            "anchor; pass (B, K)."
        )
    check_floating("scores", scores)
    check_temperature(temperature)
    return torch.softmax(wide(scores) / temperature, dim=1)
