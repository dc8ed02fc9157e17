"""What leaves a client and what it gets: every array and every scalar, its size, and why it travels.

The manifest is made without training. A client checks its actual reply against it before anything is sent.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from fedssl import seeds
from fedssl.client import beside, public_rows, scalars
from fedssl.datasets.base import Data, Partial
from fedssl.errors import FedsslError, PrivacyError
from fedssl.job.job import Job
from fedssl.job.setup import build_model, public_of, shares_of, untrained
from fedssl.measures.movement import Movement
from fedssl.method import Batch, Examples, Step, views_of
from fedssl.model import Model, layout_of, parameters, tensors, to_arrays
from fedssl.partition import Elsewhere, Parts, sizes_of
from fedssl.parts import Share, part_of
from fedssl.sites import Blank

SCALARS: Mapping[str, str] = {
    "num-examples": "the client's weight in a mean",
    "partition-id": "names the client in the logs, and orders the updates",
    "loss": "mean training loss of the round: for the logs, and for rules that weigh by it",
    "steps": "local steps: for the logs",
    "work": "share of the round's steps that was done: for the logs",
    "feature_std": "spread of the last batch's features: an alarm of collapse",
    "drift": "how far training moved the arrays: for the logs",
    "noise_multiplier": "of a private client's steps: decides epsilon",
    "sample_rate": "of a private client's steps: decides epsilon",
    "spent": "noisy steps that a private client has taken in all: decides epsilon",
}
_PRIVATE = ("noise_multiplier", "sample_rate", "spent")  # scalars that only a private client sends
_OPEN = ("loss", "feature_std")  # and those that it does not, because no noise covers them
_OTHER_SIZE = 997  # of a client: an array whose shape is another one then follows the number of examples


@dataclass(frozen=True)
class Entry:
    """One array or one scalar of a message."""

    name: str
    part: str  # of the model; "" of a scalar
    shape: tuple[int, ...]
    dtype: str
    bytes: int  # before compression
    per_example: bool  # holds data of single examples, or has a size that follows their number
    differentially_private: bool  # of itself, as it leaves the client
    why: str


@lru_cache(maxsize=8)
def uploads(job: Job, shape: tuple[Any, ...]) -> Mapping[str, Entry]:
    """The arrays that a client with every modality sends, by name.

    Args:
        job: what is run.
        shape: of one example of the data.

    Raises:
        PrivacyError: an array follows the number of examples, or belongs to a part that holds them, without consent.
    """
    model = build_model(job, shape)
    shares = shares_of(job, model)
    other = {name: tuple(value.shape) for name, value in tensors(build_model(job, shape, _OTHER_SIZE))}
    found = {}
    for name, value in to_arrays(model).items():
        if shares[name] is not Share.merge:
            continue
        part, follows = part_of(name), other.get(name) != value.shape
        if follows and part not in job.consent.allow:
            raise PrivacyError(
                f"part {part!r} would be uploaded and the size of {name!r} follows the number of examples, so it may "
                f"hold one entry for each: use strategy.share.{part}=local, or payload.allow=[{part}] if every client "
                "agrees to that"
            )
        role = "is a summary of the client's data for" if part in job.method.summaries else "is merged on the server by"
        why = f"{part} {role} {str(job.tree['strategy']['_target_']).rpartition('.')[2]}"
        found[name] = _entry(job, name, value, why, follows)
    return found


def downloads(job: Job, shape: tuple[Any, ...]) -> dict[str, Entry]:
    """The arrays that a client receives, by name: those that it will send, and those that the server alone makes."""
    model = build_model(job, shape)
    comes = [name for name, share in shares_of(job, model).items() if share.comes]
    return {
        name: _entry(job, name, value, "local training begins there") for name, value in to_arrays(model, comes).items()
    }


def _entry(job: Job, name: str, value: np.ndarray, why: str, follows: bool = False) -> Entry:
    """Of one array; `follows` says that its size is that of a client."""
    holders = {part.name for part in job.method.parts if part.holds_examples or part.sized}
    part = part_of(name)
    private = job.privacy.private or job.aggregation.private_uploads
    return Entry(name, part, value.shape, str(value.dtype), value.nbytes, follows or part in holders, private, why)


def check_reply(
    known: Mapping[str, Entry],
    arrays: Mapping[str, np.ndarray],
    metrics: Mapping[str, object],
    reported: Collection[str],
) -> None:
    """Refuse a reply that is not what the manifest says. A client calls it before it sends anything.

    Args:
        known: what `uploads` gives.
        arrays: the reply's arrays, before compression; some may be left out.
        metrics: its scalars.
        reported: the names of those that the method reports.

    Raises:
        PrivacyError: an array that is not in the manifest or has another shape or type, or a metric that is not in it
            or is no single number.
    """
    for name, value in arrays.items():
        entry = known.get(name)
        if entry is None:
            raise PrivacyError(
                f"the reply has an array {name!r} that is not in the payload manifest, so nothing is sent: only arrays "
                "of merged parts leave a client, as `fedssl payload` lists them; if it is meant to, set "
                f"strategy.share.{part_of(name)}=merge"
            )
        if value.shape != entry.shape or value.dtype != np.dtype(entry.dtype):
            raise PrivacyError(
                f"the reply has {name!r} as {value.dtype} of shape {value.shape} and the payload manifest as "
                f"{entry.dtype} of shape {entry.shape}, so nothing is sent: a shape that is this client's own can hold "
                "its examples; keep them in a part of its own with holds_examples=True"
            )
    for name, number in metrics.items():
        if name not in SCALARS and name not in reported:
            raise PrivacyError(
                f"the reply has a metric {name!r} that is not in the payload manifest, so nothing is sent: name it in "
                "fedssl.job.payload.SCALARS, or report it from the method's loss"
            )
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise PrivacyError(
                f"the metric {name!r} of the reply is a {type(number).__name__}, so nothing is sent: a list could have "
                "one entry an example; give a single number"
            )


def reports(job: Job, model: Model, data: Data, shard: Examples) -> dict[str, str]:
    """The scalars that depend on the method, each with its reason, from one batch without a step of training.

    Args:
        job: what is run.
        model: built for this client; its state changes.
        data: gives the device.
        shard: the client's examples.
    """
    method, augment, device = job.method, job.data.augment, data.train.device
    movement = Movement(parameters(model), method.parts)
    public, step = public_of(job, device), Step(1, job.federation.rounds, 0, 1)
    generator = seeds.torch_stream(job.seed, "payload", device=device)
    method.after_merge(model, shard, public, augment, step)
    index = torch.arange(min(job.local.batch_size, len(shard)), device=device)
    views = views_of(method, augment, shard.batch(index), generator)
    rows = public_rows(method, public, seeds.stream(job.seed, "payload", "public"), device)
    batch = beside(Batch(views, index), public, augment, rows)
    out = method.loss(model, batch, step)
    movement.before_following()
    method.after_step(model, out, step)  # what a client summarises may be what its steps have remembered
    said = {*scalars(out), *method.before_upload(model, shard, public, augment, generator)} - {"loss"}
    if job.privacy.private:
        said.clear()  # no noise covers them, so they stay
    moved = "how far training moved a part, or how a teacher follows: for alarms of collapse"
    return {name: f"reported by {type(method).__name__}" for name in sorted(said)} | dict.fromkeys(
        movement.measures()[0], moved
    )


def manifest(job: Job, data: Data, parts: Parts) -> dict[str, Any]:
    """The payload of a job, as `payload.json` has it: what each round exchanges with one client.

    Args:
        job: what is run.
        data: the training data, on the device that trains.
        parts: the clients' rows.

    Raises:
        PrivacyError: see `uploads`.
    """
    arrays, told = uploads(job, data.train.shape), downloads(job, data.train.shape)
    if isinstance(parts, Elsewhere):
        client, rows = 0, np.arange(2 * job.local.batch_size)  # of none that is here
        shard = Blank(data.train.shape, data.train.device).shard(rows, client)
    else:
        client = int(np.argmax(sizes_of(parts)))  # small clients may be too few for one batch
        shard = data.train.shard(parts[client], client)
    model = build_model(job, data.train.shape, len(shard), client).to(data.train.device).train()
    try:
        said = reports(job, model, data, shard)
    except FedsslError:
        said = {}  # the clients will meet the same refusal, and it is theirs to tell
    private = job.privacy.private
    told_of = {name: why for name, why in SCALARS.items() if name not in (_OPEN if private else _PRIVATE)} | said
    if not job.aggregation.each:
        told_of = {name: told_of[name] for name in ("partition-id", *(_PRIVATE if private else ()))}
    numbers = [Entry(name, "", (), "float64", 8, False, private, why) for name, why in told_of.items()]
    up, down = ({name: np.empty(e.shape, e.dtype) for name, e in entries.items()} for entries in (arrays, told))
    parameters = layout_of(model, job.method.parts).parameters
    partial = job.aggregation.each and isinstance(data.train, Partial)
    silent = range(len(parts)) if partial else ()  # else what a client lacks is sent as no change
    left_out = {str(c): sorted(untrained(data, c, arrays)) for c in silent}
    return {
        "up": [asdict(entry) for entry in [*arrays.values(), *numbers]],
        "down": [asdict(entry) for entry in told.values()],
        "left_out": {client: names for client, names in left_out.items() if names},
        "compression": {key: value for key, value in job.tree["compression"].items() if key != "_target_"},
        "bytes_up": (
            job.compression.up_bytes(up, parameters) if job.aggregation.each else job.aggregation.up_bytes(up)
        ),
        "bytes_down": job.compression.down_bytes(down, parameters),
    }


def table(content: Mapping[str, Any]) -> list[list[str]]:
    """A manifest for people: a row a part, and one for the numbers, below their headings."""
    rows = [["what", "arrays", "bytes", "of single examples", "differential privacy", "why it is sent"]]
    for part in dict.fromkeys(entry["part"] for entry in content["up"]):
        own = [entry for entry in content["up"] if entry["part"] == part]
        flags = (any(e["per_example"] for e in own), all(e["differentially_private"] for e in own))
        marks = ("yes" if flag else "no" for flag in flags)
        why = own[0]["why"] if part else ", ".join(entry["name"] for entry in own)
        rows.append([part or "numbers", str(len(own)), f"{sum(e['bytes'] for e in own):,}", *marks, why])
    return rows


def sentences(content: Mapping[str, Any]) -> list[str]:
    """What the table does not say: how it is coded, and who sends less."""
    chosen, up, down = content["compression"], content["bytes_up"], content["bytes_down"]
    each = [sum(entry["bytes"] for entry in content[way] if entry["part"]) for way in ("up", "down")]
    raw = " and ".join(f"{size:,}" for size in dict.fromkeys(each))
    coded = f"up to {up:,} bytes" if chosen["keep"] < 1 else f"{up:,} bytes"
    saved = "" if each == [up, down] else f"; uncoded they are {raw}"
    said = [f"A round takes {coded} of arrays up from each client and {down:,} down to it{saved}."]
    if content["left_out"]:
        said.append(f"Clients that cannot train everything send less: {', '.join(content['left_out'])}.")
    return said
