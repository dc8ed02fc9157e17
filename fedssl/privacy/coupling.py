"""Two probes of the live loss and network, for what no declaration shows: coupled records, and records that linger.

They run on copies of the model and on random values, before training. A user's own loss, batch statistics written by
hand and a queue in an attribute are found; what they cannot find is a coupling that sets in later.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fedssl.errors import FedsslError, PrivacyError
from fedssl.method import Augment, Batch, Examples, SSLMethod, Step, View, views_of
from fedssl.model import Model
from fedssl.networks.norms import commit_statistics
from fedssl.privacy.per_record import Engine, by_engine, dense, pieces, singles, trainable

TOLERANCE = 1e-5  # relative; losses that compute in float32 inside leave about 1e-7
_RECORDS = 6
_STEP = Step(1, 2, 0, 2)


def inputs(examples: Examples, augment: Augment, method: SSLMethod) -> list[Batch]:
    """Batches in the shapes of real views: random, other random, and equal records beside one that is unlike them.

    The last is where coupled losses show most: without the odd one InfoNCE has no gradient at all. Views that are no
    tensors (graphs) are taken from the examples, for nothing of these batches leaves the client.
    """
    count = min(_RECORDS, len(examples))
    rows = torch.arange(count)
    generator = torch.Generator().manual_seed(0)
    device_rows = rows.to(_device(examples.batch(rows[:1])))
    stream = torch.Generator(device=device_rows.device).manual_seed(0)
    views = views_of(method, augment, examples.batch(device_rows), stream)
    public = augment.plain(examples.batch(device_rows)) if method.reads_public and method.public_batch else None
    real = Batch(views, device_rows, public, None if public is None else device_rows)
    if not all(isinstance(view, Tensor) for view in views):
        return [real]

    def drawn(view: View) -> Tensor:
        return torch.rand((_RECORDS, *view.shape[1:]), generator=generator).to(view)

    index = torch.arange(_RECORDS, device=device_rows.device)
    first, second = (Batch([drawn(v) for v in views], index, _drawn(public, generator), index) for _ in range(2))
    equal = [torch.cat([v[:1].expand(_RECORDS - 1, *v.shape[1:]), v[-1:]]) for v in first.views]
    found = [first, second, replace(first, views=equal)]
    return found if public is not None else [replace(batch, public_index=None) for batch in found]


def _drawn(view: View | None, generator: torch.Generator) -> View | None:
    return None if view is None else torch.rand((_RECORDS, *view.shape[1:]), generator=generator).to(view)


def _device(view: Any) -> torch.device:
    return view.device if isinstance(view, Tensor) else torch.device("cpu")


def probe_alone(method: SSLMethod, model: Model, batches: Sequence[Batch]) -> None:
    """Refuse a loss whose gradient over a batch is not the sum of the gradients of its records alone.

    Raises:
        PrivacyError: with how far they differ, relative to their length.
    """
    for batch in batches:
        if len(batch.index) < 2:
            continue
        precise, wide = _precise(model, batch)
        try:
            out = method.loss(precise, wide, _STEP)
            whole = _gradient(precise, out.loss * len(wide.index))
            losses = [method.loss(precise, single, _STEP).loss for single in singles(wide)]
            apart = _gradient(precise, torch.stack(losses).sum())
        except (FedsslError, ValueError) as error:  # torch's own layers raise the latter
            raise PrivacyError(
                f"{type(method).__name__} cannot tell what a record contributes alone ({error}), so its gradients have "
                "no bound: use a loss and layers of single records, such as norm=group"
            ) from error
        gaps = {"gradient": _gap(whole, apart)}
        if out.per_example is not None:
            gaps["loss"] = _gap(out.per_example.detach(), torch.stack(losses).detach())
        for what, gap in gaps.items():
            if not gap <= TOLERANCE:
                raise PrivacyError(
                    f"the records of a batch act on each other in {type(method).__name__} or its network: the {what} "
                    f"of a batch differs by {gap:.1e} of its size from that of its records alone; look for statistics "
                    "over the batch, and use norm=group"
                )


def probe_engine(engine: Engine, method: SSLMethod, model: Model, batch: Batch) -> None:
    """Refuse an engine that takes something of one record for another's, at two sizes of batches.

    At one size alone, positions that a network has put first could be as many as records.

    Raises:
        PrivacyError: with the parameter at which it fails, or from the engine itself.
    """
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    for size in (2, 3) if len(batch.index) > 2 and engine is not Engine.loop else ():
        precise, wide = _precise(model, next(pieces(batch, size)))
        found, expected = (by_engine(each, method, precise, wide, _STEP).gradients for each in (engine, Engine.loop))
        for name, own, right in zip(names, found, expected, strict=True):
            if not _gap(dense(own), dense(right)) <= TOLERANCE:
                raise PrivacyError(
                    f"privacy.engine={engine} finds other gradients of records at {name} than each record has alone: "
                    "use privacy.engine=vmap or loop"
                )


def probe_state(method: SSLMethod, model: Model, batches: Sequence[Batch], augment: Augment) -> None:
    """Refuse a method or a network in which a batch leaves a trace that is not in the released parameters.

    Two copies see different examples in all that a method may do with them, and no step of an optimiser. Then all
    their tensors, also those in plain attributes, what they would upload, and their gradients on a third batch must be
    equal.

    Raises:
        PrivacyError: with the name of what differs.
    """
    if len(batches) < 2:
        return
    methods, models, held = [], [], []
    for batch in batches[:2]:
        own, after = copy.deepcopy(method), copy.deepcopy(model).train()
        said = _see(own, after, batch, augment)
        held.append(dict(reachable(after)) | dict(_walk(vars(own), "method")) | dict(_walk(said, "upload")))
        methods.append(own)
        models.append(after)
    first, second = held
    for name in first.keys() | second.keys():
        if not _same(first.get(name), second.get(name)):
            raise PrivacyError(
                f"{type(method).__name__} keeps {name!r} from one batch to the next, and what it keeps depends on the "
                "records: keep nothing but parameters that are trained with noise, and teachers that follow them"
            )
    gaps = []
    for own, after in zip(methods, models, strict=True):
        precise, wide = _precise(after, batches[-1])
        gaps.append(_gradient(precise, own.loss(precise, wide, _STEP).loss))
    if not _gap(*gaps) <= TOLERANCE:
        raise PrivacyError(
            f"the gradient of {type(method).__name__} depends on which batch was seen before: something outside of the "
            "model remembers records; keep nothing but parameters"
        )


@dataclass(frozen=True)
class _Held:
    """A client's examples that are the first view of a batch."""

    values: View

    def __len__(self) -> int:
        return len(self.values)

    def batch(self, index: Tensor) -> View:
        return self.values[index]


class _Plain:
    """An augmentation that leaves examples as they are."""

    def __init__(self, augment: Augment) -> None:
        self.modality = augment.modality

    def views(self, x: View, generator: torch.Generator, count: int) -> Sequence[View]:
        return [x] * count

    def plain(self, x: View) -> View:
        return x


def _see(method: SSLMethod, model: Model, batch: Batch, augment: Augment) -> Mapping[str, Tensor]:
    """All that happens to examples in a round, but the optimiser's step; returns what is said besides the weights."""
    own, plain = _Held(batch.views[0]), _Plain(augment)
    public = None if batch.public is None else _Held(torch.zeros_like(batch.public))
    method.after_merge(model, own, public, plain, _STEP)
    out = method.loss(model, batch, _STEP)
    method.after_step(model, out, _STEP)
    commit_statistics(model)
    return method.before_upload(model, own, public, plain, torch.Generator(device=batch.index.device).manual_seed(0))


def reachable(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that a model holds: parameters, buffers, and those in attributes, lists and dictionaries."""
    for prefix, module in model.named_modules():
        yield from _walk(vars(module), prefix)


def _walk(value: Any, name: str, depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value.detach()
    elif isinstance(value, nn.Module) or depth > 4:
        return
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _walk(item, f"{name}.{key}", depth + 1)
    elif isinstance(value, list | tuple | set) or hasattr(value, "popleft"):
        for i, item in enumerate(value):
            yield from _walk(item, f"{name}.{i}", depth + 1)


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and one.shape == other.shape and bool(torch.equal(one, other))


def _precise(model: Model, batch: Batch) -> tuple[Model, Batch]:
    """A float64 copy, in training mode, and the batch in its type."""
    wide = [view.double() if isinstance(view, Tensor) else view for view in batch.views]
    public = batch.public.double() if isinstance(batch.public, Tensor) else batch.public
    if not all(isinstance(view, Tensor) for view in wide):
        return copy.deepcopy(model).train(), batch
    return copy.deepcopy(model).double().train(), replace(batch, views=wide, public=public)


def _gradient(model: Model, loss: Tensor) -> Tensor:
    parameters = trainable(model)
    found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, found, strict=True)]
    )


def _gap(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / max(float(one.norm()), float(other.norm()), 1e-12))
