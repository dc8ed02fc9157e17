"""What a strategy that trains on the server has to work with, and what it makes there of public examples."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from fedssl import seeds
from fedssl.client import Local, fit
from fedssl.errors import ConfigError
from fedssl.gradient import PlainGradient, balanced_batches
from fedssl.losses.similarity import unit
from fedssl.method import Augment, Examples, SSLMethod
from fedssl.modalities.pairs import two_modalities
from fedssl.model import Model, load_arrays, to_arrays
from fedssl.networks.keys import keys_of, outputs_of
from fedssl.networks.norms import commit_statistics, discard_statistics
from fedssl.parts import Arrays, part_of

STUDENT = ("encoder", "projector")  # the parts that a server's own model learns


@dataclass(frozen=True, eq=False)
class Workshop:
    """A server's own model and the public examples, both on its device."""

    method: SSLMethod
    model: Model  # of the server's architecture, with its initial values
    public: Examples | None
    augment: Augment
    local: Local
    seed: int

    @property
    def examples(self) -> Examples:
        """The public examples.

        Raises:
            ConfigError: there are none.
        """
        if self.public is None:
            raise ConfigError("the strategy trains on public examples and there are none: add data@public=NAME")
        return self.public

    def student(self) -> Arrays:
        """The arrays of encoder and projector as they are now."""
        return {key: value for key, value in to_arrays(self.model).items() if part_of(key) in STUDENT}

    def every(self) -> Tensor:
        """The positions of all public examples, on the device."""
        return torch.arange(len(self.examples), device=next(self.model.parameters()).device)


@dataclass(frozen=True)
class Lesson:
    """How a student is taught.

    Attributes:
        temperature: of similarities, the same for teachers and student.
        epochs: over the public examples.
        batch_size: public examples a step.
        lr: of Adam.
        momentum: share of itself that the network which makes the student's keys keeps at each step.
    """

    temperature: float
    epochs: int
    batch_size: int
    lr: float
    momentum: float


def ensemble(projections: Sequence[np.ndarray], temperature: float, top: float = 1.0) -> Tensor:
    """How alike public examples are to their teachers together: the mean of the teachers' sharpened similarities.

    `E = mean_k exp((S_k - max_row S_k) / T)` with S_k the cosines of teacher k, its rows then divided by their sums.
    Every teacher counts once, whatever space it projects to.

    Args:
        projections: (P, D_k) of each teacher.
        temperature: T, above 0.
        top: the share of each row's cosines that is kept, besides an example's with itself; the others become 0.

    Returns:
        (P, P) float64, rows with the sum 1.

    References:
        Shi et al. 2021, https://arxiv.org/abs/2109.14611, section 3.3, as in the authors' code
    """
    total = torch.zeros(len(projections[0]), len(projections[0]), dtype=torch.float64)
    for rows in projections:
        z = unit(torch.tensor(rows, dtype=torch.float64))  # a copy, whose place in memory does not touch the last bit
        cosines = z @ z.T
        if top < 1:
            least = cosines.topk(int(top * len(z)) + 1, dim=1).values[:, -1:]
            cosines = torch.where(cosines >= least, cosines, 0.0)
        total += torch.exp((cosines - cosines.amax(1, keepdim=True)) / temperature)
    return total / total.sum(1, keepdim=True)


def teach(workshop: Workshop, start: Arrays, target: Tensor, lesson: Lesson, at: int) -> tuple[Arrays, np.ndarray]:
    """Distil similarities into the server's own encoder and projector (similarity distillation, FLESD).

    The student's projections of augmented public examples are compared with keys of all of them, which a slowly
    following copy makes, and `-sum_j target_ij log softmax_j(q_i k_j / T)` is lowered. (The authors keep the last 2048
    keys in a queue; with one key for every public example nothing is left out.)

    Args:
        workshop: the model, and the public examples.
        start: all arrays of its encoder and projector to begin with.
        target: (P, P), rows with the sum 1.
        lesson: the options.
        at: the round, which names the random numbers.

    Returns:
        The arrays of encoder and projector, and (P, D) the student's projections of the public examples at length 1.
    """
    model, public, augment = workshop.model, workshop.examples, workshop.augment
    load_arrays(model, start)
    student = nn.Sequential(*(model[name] for name in STUDENT)).train()
    follower = copy.deepcopy(student).requires_grad_(False)
    every = workshop.every()
    wanted = target.to(every.device, torch.float32)
    keys = keys_of(follower, public, every, augment)
    optimizer = torch.optim.Adam(student.parameters(), lr=lesson.lr)
    order = seeds.stream(workshop.seed, "server", "round", at, "order")
    pixels = seeds.torch_stream(workshop.seed, "server", "round", at, "augment", device=every.device)
    for index in balanced_batches(len(public), lesson.batch_size, lesson.epochs, order):
        rows = index.to(every.device)
        examples = public.batch(rows)
        views = augment.views(examples, pixels, 2)
        both = two_modalities(views)  # then each tower is asked, and the key is of the pair
        with torch.no_grad():
            keys[rows] = unit(follower(augment.plain(examples) if both else views[1]))
        queries = [unit(student(view)) for view in (views if both else views[:1])]  # each (B, D)
        guesses = [torch.log_softmax(query @ keys.T / lesson.temperature, dim=1) for query in queries]  # each (B, P)
        loss = -(wanted[rows] * torch.stack(guesses)).sum(2).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own signature is untyped
        optimizer.step()
        commit_statistics(student)
        discard_statistics(follower)
        _follow(follower, student, lesson.momentum)
    return workshop.student(), keys_of(student, public, every, augment).cpu().numpy()


@torch.no_grad()
def _follow(follower: nn.Module, student: nn.Module, momentum: float) -> None:
    for slow, fast in zip(follower.state_dict().values(), student.state_dict().values(), strict=True):
        if slow.is_floating_point():
            slow.lerp_(fast, 1 - momentum)
        else:
            slow.copy_(fast)


def public_base(workshop: Workshop, epochs: int) -> np.ndarray:
    """(P, D) projections of the public examples by a model that the method has trained on nothing but them."""
    model, public = copy.deepcopy(workshop.model), workshop.examples
    fit(
        workshop.method,
        model,
        public,
        workshop.augment,
        replace(workshop.local, epochs=epochs),
        gradient=PlainGradient(),
        round=1,
        rounds=1,
        seed=seeds.key(workshop.seed, "server", "base"),
        client=-1,
    )
    network = nn.Sequential(*(model[name] for name in STUDENT))
    return outputs_of(network, public, workshop.every(), workshop.augment).cpu().numpy()
