"""Each record's own gradient: that of the loss of all its views, differentiated alone, then clipped and added up."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum, auto
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from fedssl.errors import ConfigError, PrivacyError
from fedssl.gradient import split
from fedssl.method import Batch, LossOutput, SSLMethod, Step
from fedssl.model import Model
from fedssl.privacy.ghost.outer import Outer
from fedssl.privacy.ghost.tape import collected, noting

_PUBLIC_ROWS = (
    "opacus' hooks add the gradients of the public examples beside a batch to those of its records, row by row: use "
    "privacy.engine=vmap"
)

_CANCELLED = 10.0  # clip norms: more may not cancel out in what is measured by inner products; see `Outer.lengths`


class Engine(StrEnum):
    """How the gradients of single records are found; all give the same numbers."""

    ghost = auto()  # one ordinary pass over the batch; the fastest
    vmap = auto()  # torch.func: one vectorised pass over records
    hooks = auto()  # opacus: for networks that vmap cannot trace
    loop = auto()  # one record after another: for anything, slowly


@dataclass(frozen=True)
class Records:
    """The gradients of some records, and what their loss returned.

    Attributes:
        gradients: for each trainable parameter (n, *shape), or what they are sums of.
        losses: (n,) detached.
        features: (n, D) detached.
        aux: the methods' own tensors, with a leading n.
    """

    gradients: Sequence[Tensor | Outer]
    losses: Tensor
    features: Tensor
    aux: Mapping[str, Tensor]


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that gradients reach, in the model's order: all of them are clipped together and noised."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


class _Objective(nn.Module):
    """The loss of one record, as a batch of one, as a module whose parameters can be replaced."""

    def __init__(self, method: SSLMethod, model: Model) -> None:
        super().__init__()
        self.method, self.model = method, model

    def forward(self, views: Sequence[Tensor], index: Tensor, batch: Batch, step: Step) -> LossOutput:
        alone = Batch([view[None] for view in views], index[None], batch.public, batch.public_index)
        return self.method.loss(self.model, alone, step)


def by_vmap(
    method: SSLMethod, model: Model, batch: Batch, step: Step, only: Sequence[nn.Parameter] | None = None
) -> Records:
    """Vectorised over the records of a batch whose views are tensors; its memory is records times parameters.

    A layer that normalises over the batch sees one record here, so it could not couple records even if admitted.

    Args:
        only: of the trainable parameters; None: all.
    """
    objective = _Objective(method, model)
    wanted = {id(p) for p in (trainable(model) if only is None else only)}
    constant = {name: p.detach() for name, p in objective.named_parameters()}
    values = {name: constant.pop(name) for name, p in objective.named_parameters() if id(p) in wanted}

    def loss(parameters: dict[str, Tensor], views: Sequence[Tensor], index: Tensor) -> tuple[Tensor, Any]:
        out: LossOutput = functional_call(objective, {**constant, **parameters}, (views, index, batch, step))
        return out.loss, (out.features[0].detach(), {key: value.detach() for key, value in out.aux.items()})

    each = vmap(grad_and_value(loss, has_aux=True), in_dims=(None, 0, 0), randomness="different")
    gradients, (losses, (features, aux)) = each(values, list(batch.views), batch.index)
    return Records([gradients[name] for name in values], losses.detach(), features, aux)


def by_ghost(method: SSLMethod, model: Model, batch: Batch, step: Step) -> Records:
    """One pass over the batch in which known layers note what they see: exact for losses without coupling.

    Parameters that anything else reads too (a learnable scalar, a normalised weight) go through `by_vmap`, and so does
    all with public examples beside the batch, whose rows belong to every record.

    Raises:
        PrivacyError: a layer saw another number of rows than there are records.
    """
    if batch.public is not None:
        return by_vmap(method, model, batch, step)
    parameters = trainable(model)
    with noting(model, len(batch.index)) as tape:
        out = method.loss(model, batch, step)
    if out.per_example is None:
        return by_vmap(method, model, batch, step)
    found, others = collected(tape, out.per_example, parameters)
    if others:
        ordered = [p for p in parameters if any(p is other for other in others)]
        found.update(zip(ordered, by_vmap(method, model, batch, step, ordered).gradients, strict=True))
    scalars = {key: value.detach().expand(len(batch.index)) for key, value in out.aux.items() if value.dim() == 0}
    return Records([found[p] for p in parameters], out.per_example.detach(), out.features.detach(), scalars)


def by_loop(method: SSLMethod, model: Model, batch: Batch, step: Step) -> Records:
    """Record by record: the definition, which the others are tested against."""
    parameters = trainable(model)
    rows: list[list[Tensor]] = []
    outs: list[LossOutput] = []
    for alone in singles(batch):
        out = method.loss(model, alone, step)
        found = torch.autograd.grad(out.loss, parameters, allow_unused=True)
        rows.append([torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)])
        outs.append(out)
    return Records(
        [torch.stack(column) for column in zip(*rows, strict=True)],
        torch.stack([out.loss.detach() for out in outs]),
        torch.cat([out.features.detach() for out in outs]),
        {key: torch.stack([out.aux[key].detach() for out in outs]) for key in outs[0].aux},
    )


def check_engine(engine: str, method: SSLMethod) -> None:
    """Refuse an engine that is unknown, or that cannot tell a method's records apart.

    Raises:
        ConfigError: an unknown engine.
        PrivacyError: hooks, and public examples beside each batch.
    """
    if engine not in list(Engine):
        raise ConfigError(f"privacy.engine={engine!r} is unknown: use {', '.join(Engine)}")
    if engine == Engine.hooks and method.reads_public and method.public_batch:
        raise PrivacyError(_PUBLIC_ROWS)


def by_hooks(method: SSLMethod, model: Model, batch: Batch, step: Step) -> Records:
    """Opacus' hooks on one batch: exact for losses without coupling whose forward passes see one row a record.

    Raises:
        PrivacyError: a parameter was left without gradients of records, for example because it belongs to no layer
            that opacus knows; or public examples beside the batch, whose rows would count as records.
    """
    from opacus.grad_sample import GradSampleModule  # opacus takes a second to import

    if batch.public is not None:
        raise PrivacyError(_PUBLIC_ROWS)
    wrapped = GradSampleModule(model, loss_reduction="mean", strict=False)
    changing = [module for module in model.modules() if getattr(module, "inplace", False)]
    for module in changing:  # hooks hand on views, which may not be written to
        module.inplace = False  # type: ignore[assignment]  # of activations
    try:
        out = method.loss(model, batch, step)
        if out.per_example is None:
            raise PrivacyError(
                f"{type(method).__name__} names no loss of single records, so hooks cannot tell them apart: use "
                "privacy.engine=vmap"
            )
        with warnings.catch_warnings():  # the first layer's inputs need no gradient, which torch remarks on
            warnings.filterwarnings("ignore", "Full backward hook", UserWarning)
            out.per_example.mean().backward()  # type: ignore[no-untyped-call]  # torch's own signature is untyped
        gradients = []
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            found = getattr(parameter, "grad_sample", None)
            if not isinstance(found, Tensor) or len(found) != len(batch.index):
                raise PrivacyError(
                    f"opacus' hooks give no gradient for each record at {name}: use privacy.engine=vmap or loop"
                )
            gradients.append(found.detach())
            parameter.grad_sample = parameter.grad = None  # type: ignore[attr-defined]
    finally:
        wrapped.remove_hooks()
        for module in changing:
            module.inplace = True  # type: ignore[assignment]
    return Records(gradients, out.per_example.detach(), out.features.detach(), {})


def by_engine(engine: Engine, method: SSLMethod, model: Model, batch: Batch, step: Step) -> Records:
    """As the engine says; views that are no tensors, such as graphs, go through the loop."""
    if engine is Engine.loop or not all(isinstance(view, Tensor) for view in batch.views):
        return by_loop(method, model, batch, step)
    return {Engine.ghost: by_ghost, Engine.vmap: by_vmap, Engine.hooks: by_hooks}[engine](method, model, batch, step)


def singles(batch: Batch) -> Iterator[Batch]:
    """Batches of one record each."""
    return pieces(batch, 1)


def pieces(batch: Batch, size: int) -> Iterator[Batch]:
    """Consecutive batches of at most `size` records, with the same public examples beside each."""
    for *views, index in zip(*(split(view, size) for view in batch.views), split(batch.index, size), strict=True):
        yield Batch(views, index, batch.public, batch.public_index)


def dense(gradient: Tensor | Outer) -> Tensor:
    """(n, *shape)."""
    return gradient.dense() if isinstance(gradient, Outer) else gradient


def norms(gradients: Iterable[Tensor | Outer]) -> Tensor:
    """(n,) the length of each record's gradient over all parameters, in float64 so that no small one is lost."""
    return _whole([g.lengths()[0] if isinstance(g, Outer) else _lengths(g) for g in gradients])


def clipped_sum(gradients: Sequence[Tensor | Outer], clip_norm: float) -> list[Tensor]:
    """The sum over records of their gradients, each shortened to at most `clip_norm` (Abadi et al. 2016).

    A gradient that is not finite counts as none: one bad record may not decide whether the others are heard. What is
    added up must be what was measured: sums of long terms that cancel out are formed, and then measured.
    """
    short = [g for g in gradients if isinstance(g, Tensor) and g.dim() <= 2]  # of biases and norms: many, so as one
    others = [g for g in gradients if isinstance(g, Outer) or g.dim() > 2]
    packed = [torch.cat([_rows(g) for g in short], 1)] if short else []
    with torch.autocast(gradients[0].device.type, enabled=False):
        totals = iter(_clipped_sum([*packed, *others], clip_norm))
    parts = iter(torch.split(next(totals), [math.prod(g.shape[1:]) for g in short]) if short else ())
    return [
        next(parts).view(g.shape[1:]) if isinstance(g, Tensor) and g.dim() <= 2 else next(totals) for g in gradients
    ]


def _clipped_sum(gradients: Sequence[Tensor | Outer], clip_norm: float) -> list[Tensor]:
    measured = [g.lengths() if isinstance(g, Outer) else (_lengths(g), None) for g in gradients]
    lengths = _whole([own for own, _ in measured])
    sound = lengths.isfinite()
    factors = torch.where(sound, (clip_norm / lengths).clamp(max=1.0), 0.0)
    bounds = [bound for _, bound in measured if bound is not None]
    if bounds and not bool((torch.stack(bounds) * factors <= _CANCELLED * clip_norm).all()):
        return _clipped_sum([dense(g) for g in gradients], clip_norm)
    # 0 times infinity is no number. On a GPU, asking whether there is any would wait for it.
    if sound.is_cuda or not bool(sound.all()):
        gradients = [g.only(sound) if isinstance(g, Outer) else _only(g, sound) for g in gradients]
    return [g.weighted(factors) if isinstance(g, Outer) else _weighted(g, factors) for g in gradients]


def _whole(lengths: Sequence[Tensor]) -> Tensor:
    """(n,) of records, from (n,) of each parameter."""
    found: Tensor = torch.linalg.vector_norm(torch.stack(list(lengths)), dim=0)
    return found


def _lengths(gradient: Tensor) -> Tensor:
    """(n,) float64; on a CPU the squares of 64 numbers are added in float32, which is five times faster."""
    rows, norm = _rows(gradient), torch.linalg.vector_norm
    if rows.dtype is torch.float32 and not rows.is_cuda:
        even = rows.shape[1] - rows.shape[1] % 64
        some = norm(rows[:, :even].view(len(rows), even // 64, 64), dim=2)
        rest = norm(rows[:, even:], dim=1, dtype=torch.float64)
        found: Tensor = torch.hypot(norm(some, dim=1, dtype=torch.float64), rest)
        if bool(found.isfinite().all()):
            return found
    return cast(Tensor, norm(rows, dim=1, dtype=torch.float64))  # squares of float32 may have been too large for it


def _weighted(gradient: Tensor, factors: Tensor) -> Tensor:
    order = _stored(gradient)
    total = (factors.to(gradient.dtype) @ _rows(gradient)).view([gradient.shape[axis] for axis in order])
    return total.permute([order.index(axis) for axis in range(1, gradient.dim())])


def _rows(gradient: Tensor) -> Tensor:
    """(n, -1) without a copy, in the order of `_stored`."""
    return gradient.permute(0, *_stored(gradient)).reshape(len(gradient), -1)


def _stored(gradient: Tensor) -> list[int]:
    """The axes but the first, in the order in which they lie in memory."""
    return sorted(range(1, gradient.dim()), key=gradient.stride, reverse=True)


def _only(gradient: Tensor, sound: Tensor) -> Tensor:
    return torch.where(sound.view(-1, *([1] * (gradient.dim() - 1))), gradient, torch.zeros_like(gradient))
