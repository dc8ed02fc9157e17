"""The model of a thread, made ready for the client that it trains next."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch

from fedssl.descent import Pull
from fedssl.flower.codec import ClientState, Memo
from fedssl.flower.rule import Own, PartRule
from fedssl.job import Job
from fedssl.job.setup import build_model, shares_of
from fedssl.method import Examples
from fedssl.model import Model, derive, layout_of, load_arrays, to_arrays
from fedssl.parts import Arrays, Layout, Share


class Worker(threading.local):
    """One model a thread, used again for each client that the thread trains."""

    text: str = ""
    admitted: str = ""  # the text of the model that has been looked at
    model: Model
    initial: Arrays
    shares: dict[str, Share]
    layout: Layout
    rule: PartRule | None  # the strategy, if it has a client side; that keeps no state

    def admit(self, job: Job, shard: Examples) -> None:
        """Look once at whether what a job claims of single examples holds for this model.

        Raises:
            PrivacyError: it does not.
        """
        if self.admitted != self.text:
            job.privacy.admit(job.method, self.model, shard, job.data.augment)
            self.admitted = self.text

    @property
    def pull(self) -> Pull | None:
        """The strategy's proximal term over the parameters that it merges."""
        if self.rule is None or not self.rule.proximal:
            return None
        shared = [p for key, p in self.model.named_parameters() if self.shares[key] is Share.merge and p.requires_grad]
        return Pull.towards_now(self.rule.proximal, shared)


_worker = Worker()


def prepare(job: Job, client: int, shape: tuple[Any, ...], examples: int, device: torch.device) -> Worker:
    """This thread's worker with a model for a client; a new model only where the last one does not fit."""
    sized = any(part.sized for part in job.method.parts)
    text = f"{device}:{job.encoder_name(client)}:{examples if sized else 0}:{job.text}"
    if _worker.text != text:
        model = build_model(job, shape, examples, client)
        _worker.shares = shares_of(job, model)
        _worker.layout = layout_of(model, job.method.parts)
        _worker.initial = to_arrays(model)
        _worker.model = model.to(device)
        strategy = job.strategy()
        _worker.rule = strategy if isinstance(strategy, PartRule) else None
        _worker.text = text
    return _worker


def forget() -> None:
    """Free this thread's model, where the thread will go on with other things."""
    _worker.__dict__.clear()


@dataclass(frozen=True)
class Start:
    """What a client's turn begins with.

    Attributes:
        received: the server's arrays in full.
        merged: the same as training starts from them, under the strategy's rule.
        memo: what the rule remembers.
        local: the names of the arrays that stay with the client.
        state: what the client has kept of its earlier turns.
    """

    received: Arrays
    merged: Arrays
    memo: Memo
    local: list[str]
    state: ClientState


def load(worker: Worker, job: Job, received: Arrays, state: ClientState, at: int, client: int) -> Start:
    """Fill the worker's model for this client; `at` is the round after the one that made what it has received."""
    start, memo = received, state.memo
    if worker.rule is not None:
        own = Own(state.mine, state.memo, state.round, client)
        start, memo = worker.rule.receive(received, own, at, worker.layout)
    local = [key for key, share in worker.shares.items() if share is Share.local]
    load_arrays(worker.model, {key: worker.initial[key] for key in local} | state.local)
    load_arrays(worker.model, start)  # after the local ones: a rule may refresh a local teacher
    derive(worker.model, job.method.parts, [key for key, share in worker.shares.items() if share is Share.derived])
    merged = {key: start.get(key, value) for key, value in received.items()}
    return Start(received, merged, memo, local, state)
