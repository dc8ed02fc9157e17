"""DP-SGD for contrastive losses, pair by pair: the gradients of similarities are clipped, not those of records."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fedssl import temperature as rules
from fedssl.errors import PrivacyError
from fedssl.method import Augment, Batch, Examples, LossOutput, SSLMethod, Step
from fedssl.methods.common.wrapper import Wrapper
from fedssl.methods.sigmoid import SigmoidPairs
from fedssl.methods.simclr import SimCLR
from fedssl.model import Model
from fedssl.networks.heads import embed
from fedssl.parts import Coupling
from fedssl.privacy import contract, coupling
from fedssl.privacy.coupled.pair_gradients import cotangents, look, pulled_back, scores_of
from fedssl.privacy.coupled.pair_rules import NTXentPairs, PairRule, SigmoidRule
from fedssl.privacy.noise import Noise
from fedssl.privacy.per_record import trainable
from fedssl.privacy.record_dp import Planned, RecordDP, nothing
from fedssl.temperature import Scheduled

COLDEST = 0.5  # of a softmax over pairs, unless it is forced
_BATCH = 256  # records, for the sentence that says how loud the noise is


@dataclass(frozen=True)
class PairDP(RecordDP):
    """Sum over pairs of views of their clipped similarity gradients, weighted by the loss, plus noise.

    In a contrastive loss a record is in the gradient of every other one, but the *pairs* of which the gradient is a sum
    depend on two records each. Each pair's gradient of its cosine is shortened to `clip_norm` B, by an upper bound of
    its length, and one record moves the weighted sum by `sensitivity(temperature)` B (`pair_rules` has the proofs, for
    batches of any size): 24 B for NT-Xent at 0.5, growing like e^(2 / temperature), and below 4 B / temperature for the
    sigmoid loss. Noise is relative to that. Pair-wise clipping is Logit-DP (https://arxiv.org/abs/2310.03104).

    Attributes:
        clip_norm: B.
        micro_batch: gradients of the model that are held at once; one view needs as many as the projection has numbers.
        force: whether NT-Xent may have a temperature below 0.5, where the noise drowns the signal.
    """

    micro_batch: int = 512
    force: bool = False

    @property
    def released(self) -> str:
        """In words."""
        return (
            "the weighted sum of the pairs' clipped similarity gradients with Gaussian noise, each step; all that is "
            "sent follows from it"
        )

    def check(self, method: SSLMethod) -> None:
        """Raise a PrivacyError unless the loss is one of those with a bound, at a temperature that no batch decides."""
        rule = rule_of(method)
        coldest = min(temperature_at(method, progress) for progress in (0.0, 1.0))
        if not rule.sensitivity(coldest) < math.inf:
            raise PrivacyError(
                f"method.temperature reaches {coldest:g}, at which one record moves the sum of pairs by more than can "
                "be written down: use 0.5 or more"
            )
        if isinstance(rule, NTXentPairs) and coldest < COLDEST and not self.force:
            percent = 100 * noise_over_signal(rule, coldest, _BATCH)
            raise PrivacyError(
                f"method.temperature reaches {coldest:g}, at which one record can move the softmax of every other: "
                f"noise of multiplier 1 is {percent:.0f} % of the largest sum that {_BATCH} records can have; use "
                f"method.temperature=0.5 or more, or method=sigmoid, or privacy.force=true"
            )
        contract.check_heads(method, "pairs")

    def admit(self, method: SSLMethod, model: Model, examples: Examples, augment: Augment) -> None:
        """Raise a PrivacyError if projections depend on other records, or something of a record outlives its step."""
        contract.check_network(model, method)
        inputs = coupling.inputs(examples, augment, method)
        if not all(isinstance(view, Tensor) for view in inputs[0].views):
            raise PrivacyError(
                f"privacy=pairs needs the Jacobian of each view alone, which has no vectorised form for "
                f"{augment.modality}: use privacy=groups"
            )
        if any(isinstance(module, torch.nn.modules.dropout._DropoutNd) for module in model.modules()):
            raise PrivacyError(
                "the network draws dropout anew in every pass, so the pairs that are clipped would not be those that "
                "are added up: build it without dropout, or use privacy=groups"
            )
        coupling.probe_alone(_Projections(method), model, inputs)
        probe_pairs(method, model, inputs[0])
        coupling.probe_state(method, model, inputs, augment)

    def noisy_sum(
        self, method: SSLMethod, model: Model, batch: Batch, step: Step, planned: Planned, noise: Noise
    ) -> tuple[list[Tensor], LossOutput]:
        """Records whose projections or Jacobians are not finite count as not sampled; the rest meet in pairs."""
        rule, temperature = rule_of(method), temperature_at(method, step.progress)
        sums, out = [torch.zeros_like(p) for p in trainable(model)], nothing(model)
        with torch.autocast(batch.index.device.type, enabled=False):  # the bound is of the numbers that are added up
            if len(batch.index):
                sums, out = pair_sum(rule, model, batch, temperature, self.clip_norm, self.micro_batch)
        deviation = planned.noise_multiplier * rule.sensitivity(temperature) * self.clip_norm
        return [total + noise.like(total, deviation) for total in sums], out


def pair_sum(
    rule: PairRule, model: Model, batch: Batch, temperature: float, clip_norm: float, held: int
) -> tuple[list[Tensor], LossOutput]:
    """The sum that is released, before its noise, and what the loss is; both 0 if no record is sound.

    Args:
        rule: the loss.
        model: encoder and projector.
        batch: with two views of each of n records, n at least 1.
        temperature: above 0.
        clip_norm: of the gradient of a pair's cosine.
        held: see `pair_gradients.look`.
    """
    seen = look(model, batch.views, held)
    fine = seen.sound().view(2, -1).all(0).nonzero().flatten()
    if not len(fine):
        return [torch.zeros_like(p) for p in trainable(model)], nothing(model)
    seen = seen.only(torch.cat([fine, fine + len(batch.index)]))
    weights = rule.weights(scores_of(seen), temperature)
    sums, (first, second), features = pulled_back(
        model, [view[fine] for view in batch.views], cotangents(seen, weights, clip_norm)
    )
    return sums, LossOutput(rule.value(first, second, temperature), None, features, {})


def probe_pairs(method: SSLMethod, model: Model, batch: Batch) -> None:
    """Refuse a loss whose gradient over a batch is not the sum of pairs that the bound is of.

    Raises:
        PrivacyError: with how far they differ, relative to their length.
    """
    precise = copy.deepcopy(model).double().train()
    wide = replace(batch, views=[view.double() for view in batch.views])
    parameters, step = trainable(precise), Step(1, 2, 0, 2)
    loss = method.loss(precise, wide, step).loss * len(wide.index)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    whole = torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, found, strict=True)]
    )
    sums, _ = pair_sum(rule_of(method), precise, wide, temperature_at(method, step.progress), math.inf, 512)
    pairs = torch.cat([total.flatten() for total in sums])
    gap = float((whole - pairs).norm() / whole.norm().clamp(min=1e-9))
    if not gap <= coupling.TOLERANCE:
        raise PrivacyError(
            f"the gradient of {type(method).__name__} differs by {gap:.1e} of its size from the sum of pairs whose "
            "bound is known, so the bound is not its own: use privacy=groups"
        )


def rule_of(method: SSLMethod) -> PairRule:
    """The method's loss as a sum over pairs.

    Raises:
        PrivacyError: it is another loss, or one of similarities without a bound.
    """
    if method.reads_public or method.coupling is Coupling.none:
        raise PrivacyError(
            f"{type(method).__name__} contrasts no pairs of records as it is configured, so there are none to clip: "
            "use privacy=example"
        )
    if type(method) is SimCLR and method.similarity == "cosine":
        return NTXentPairs()
    if type(method) is SigmoidPairs:
        return SigmoidRule(method.bias)
    if type(method) is SimCLR:
        raise PrivacyError(
            f"method.similarity={method.similarity} has no bound, and how far a record moves a pair's weight follows "
            "from that of similarities: use method.similarity=cosine"
        )
    raise PrivacyError(
        f"privacy=pairs has bounds for the losses of method=simclr and method=sigmoid and none for that of "
        f"{type(method).__name__}: use one of them, or {contract.nearest(method, 'pairs')}"
    )


def temperature_at(method: SSLMethod, progress: float) -> float:
    """The temperature of a step, if it is a constant or follows the progress of the run.

    Raises:
        PrivacyError: the batch decides it.
    """
    chosen = rules.rule(getattr(method, "temperature", 1.0))
    if isinstance(chosen, float):
        return chosen
    if type(chosen) is Scheduled:
        nobody = torch.zeros(0)
        return chosen.at(nobody, nobody[:, None], progress)
    raise PrivacyError(
        f"method.temperature={type(chosen).__name__} is read off the batch, so one record moves the weights of all "
        "pairs without a bound: use a number, or cosine"
    )


def noise_over_signal(rule: PairRule, temperature: float, records: int) -> float:
    """The noise's deviation at multiplier 1 over the length of the largest sum, `2 records B / temperature`.

    Far below 1 is what training needs; at 1 a batch of records that all pull the same way is as loud as the noise in
    one direction, and there are as many directions as parameters.
    """
    return rule.sensitivity(temperature) * temperature / (2 * records)


class _Projections(Wrapper):
    """Projections of a method under a loss of single records: coupled only if the network couples them."""

    coupling: ClassVar[Coupling] = Coupling.none

    def loss(self, model: Model, batch: Batch, step: Step) -> LossOutput:
        """Mean over records of a fixed function of all their projections."""
        features, projections = embed(model, batch.views)
        each = torch.stack([torch.tanh(z + 0.1 * z.square()).sum(1) for z in projections]).sum(0)
        return LossOutput(each.mean(), each, features[0], {})
