"""What server and clients build alike from a job: the data, the seeded model, its shares, the device."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from fedssl.build import build
from fedssl.datasets.base import Data, Partial, Shard
from fedssl.errors import ConfigError, ProtocolError
from fedssl.files import fingerprint, read_arrays
from fedssl.job.job import Job
from fedssl.method import Examples, Sizes
from fedssl.model import Model, derive, load_arrays, norm_keys, seed_parameters, tensors
from fedssl.networks.foreign import SUFFIXES, fit_names, read_foreign
from fedssl.networks.keys import spread
from fedssl.parts import Arrays, Share, part_of, resolve_shares
from fedssl.sites import Sites, has_place, own_data
from fedssl.workshop import Workshop


def device_of(job: Job) -> torch.device:
    """The device that a job trains on here; `auto` takes a GPU where there is one.

    Raises:
        ConfigError: the device does not exist on this machine.
    """
    name = job.device
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device={name} is not a device: use auto, cpu, cuda or cuda:1") from error
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise ConfigError(
            f"device={name} is not there: this machine has {torch.cuda.device_count()} GPUs for torch; use device=auto"
        )
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device={name} is not supported: use auto, cpu, cuda or cuda:1")
    return device


_loading = threading.Lock()


@lru_cache(maxsize=16)  # a client asks several times a turn
def _node(job: Job, name: str) -> str:
    return json.dumps(job.tree[name], sort_keys=True)


_OWN = 16  # data sets of nodes that share this process, at most
_own: OrderedDict[tuple[object, ...], tuple[str, Data]] = OrderedDict()  # with what their place looked like


def held(job: Job, place: str, device: torch.device) -> Data:
    """A node's own data on a device; read once in a process, and again when a file has come, gone or changed.

    Raises:
        ConfigError: it cannot be read from this place, or examples have another shape than the job says.
        ProtocolError: the job is for clients that share one data set.
    """
    if not isinstance(job.partition, Sites):
        raise ProtocolError(
            "this node trains on its own data-dir alone and the run names a common data set: run it with "
            "partition=sites, or start the node without data-dir"
        )
    key = (_node(job, "data"), place, job.partition, device)
    look = fingerprint(Path(place).expanduser())  # before it is read: what comes meanwhile is read next time
    with _loading:
        if _own.get(key, ("",))[0] != look:
            _own.pop(key, None)  # first, for there may not be room for both
            _own[key] = look, own_data(json.loads(key[0]), place, job.partition, device)
            while len(_own) > _OWN:
                _own.popitem(last=False)
        return _own[key][1]


@lru_cache(maxsize=2)  # the private and the public data
def _load(text: str, device: str) -> Data:
    data: Data = build(json.loads(text), "data").load()
    return replace(data, train=data.train.to(device), test=data.test.to(device))


def data_of(job: Job, device: torch.device) -> Data:
    """The job's data on a device; read once in a process, by whoever asks first.

    Where clients have data of their own, this is the server's: none if it has no path.
    """
    if isinstance(job.partition, Sites) and not has_place(job.tree["data"]):
        return job.partition.blank
    with _loading:
        return _load(_node(job, "data"), str(device))


def public_of(job: Job, device: torch.device) -> Examples | None:
    """The public examples that every client may read, as many as the method reads of them, or None.

    Raises:
        ConfigError: they are not of the shape of the private ones.
    """
    if job.tree.get("public") is None:
        return None
    with _loading:
        public = _load(_node(job, "public"), str(device)).train
    shape = data_of(job, device).train.shape
    if public.shape != shape:
        raise ConfigError(
            f"the public examples have the shape {public.shape} and the clients' {shape}: one encoder cannot take "
            "both, choose another data@public"
        )
    return Shard.of(public, spread(len(public), job.method.public_limit).numpy())


def build_model(job: Job, shape: tuple[Any, ...], examples: int = 0, client: int | None = None) -> Model:
    """The job's model on the CPU with its seeded initial values; a teacher starts equal to its student.

    Args:
        job: gives encoder, method and seed.
        shape: of one example of the data.
        examples: of this client, for parts that hold one entry an example; 0 on the server.
        client: whose model, where clients have encoders of their own; None: the server's.
    """
    encoder, dim = job.encoder_of(client).make(shape)
    public = public_of(job, device_of(job)) if job.method.reads_public else None
    sizes = Sizes(dim, examples, shape, job.federation.clients, 0 if public is None else len(public))
    model = job.method.init(encoder, sizes)
    seed_parameters(model, job.seed)
    _follow(job, model)
    return model


def initial_model(job: Job, shape: tuple[Any, ...], examples: int = 0) -> Model:
    """The model that the server begins with: seeded, and with the encoder of the run or file that `start` names.

    Only the server reads it: clients get what it begins with. Heads stay seeded, teachers follow the encoder.

    Raises:
        ConfigError: there is no encoder, or another one.
    """
    model = build_model(job, shape, examples)
    if job.start is None:
        return model
    load_arrays(model, _start_of(job.start, model))
    _follow(job, model)
    return model


def _start_of(start: str, model: Model) -> Arrays:
    """The arrays of the encoder to begin with, from a run's directory or a file of weights."""
    if not Path(start).is_dir() and Path(start).suffix in SUFFIXES:
        own = fit_names(read_foreign(Path(start)), model["encoder"], start)
        return {f"encoder.{name}": value for name, value in own.items()}
    path = Path(start) / "encoder.safetensors"
    if not path.is_file():
        raise ConfigError(
            f"start={start} has no encoder: name the directory of a run that has ended, or a file of weights "
            f"({', '.join(SUFFIXES)})"
        )
    arrays = {f"encoder.{name}": value for name, value in read_arrays(path)[0].items()}
    there = {name: tuple(value.shape) for name, value in arrays.items()}
    here = {name: tuple(value.shape) for name, value in tensors(model) if part_of(name) == "encoder"}
    if odd := sorted(name for name in there.keys() | here.keys() if there.get(name) != here.get(name)):
        raise ConfigError(
            f"start={start} has another encoder: {odd[0]} is {there.get(odd[0], 'absent')} there and "
            f"{here.get(odd[0], 'absent')} here; use its options of `encoder`, and data of its shape"
        )
    return arrays


def _follow(job: Job, model: Model) -> None:
    """Teachers and frozen copies become what they follow."""
    derive(model, job.method.parts, [f"{part.name}." for part in job.method.parts if part.follows])


def shares_of(job: Job, model: Model) -> dict[str, Share]:
    """Who owns each array of the job's model."""
    keys = [key for key, _ in tensors(model)]
    return resolve_shares(job.method.parts, job.ownership, keys, norm_keys(model), job.consent.allow)


def untrained(data: Data, client: int, keys: Iterable[str]) -> frozenset[str]:
    """Those arrays that a client cannot train, nor its teacher follow, for want of a modality: it leaves them out."""
    starts = data.train.untrained(client) if isinstance(data.train, Partial) else ()
    return frozenset(key for key in keys for start in starts if f".{start}" in f".{key}")


def workshop_of(job: Job, device: torch.device, shape: tuple[Any, ...]) -> Workshop:
    """What a strategy that trains on the server works with."""
    model = initial_model(job, shape).to(device)
    return Workshop(job.method, model, public_of(job, device), job.data.augment, job.local, job.seed)
