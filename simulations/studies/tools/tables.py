"""T3 on finite sets: critics that are tables, trained with the library's InfoNCE by clients whose noise differs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedssl import seeds
from fedssl.losses import info_nce
from fedssl.theory import critic_bias, optimal_critic

Array = NDArray[np.float64]


@dataclass(frozen=True)
class World:
    """What the clients see: positives from joints, negatives from noises; shares weigh the clients."""

    joints: Array  # (M, X, Y), each sums to 1
    noises: Array  # (M, Y), each sums to 1
    shares: Array  # (M,), sum to 1

    @property
    def joint(self) -> Array:
        """(X, Y) of everybody's pairs together."""
        return np.tensordot(self.shares, self.joints, axes=1)

    @property
    def noise(self) -> Array:
        """(Y,) of everybody's negatives together."""
        found: Array = self.shares @ self.noises
        return found

    def pooled(self) -> World:
        """One client that holds everything."""
        return World(self.joint[None], self.noise[None], np.ones(1))

    def ratio(self) -> Array:
        """(X, Y): the optimal critic of everything, log p(y|x) - log q(y), up to c(x)."""
        return optimal_critic(self.joint, self.noise)

    def predicted(self) -> Array:
        """(X, Y): what the average of the clients' optimal critics adds to it; `critic_bias` where p(y|x) is common."""
        given = self.joints / self.joints.sum(2, keepdims=True)
        if np.allclose(given, given[:1], rtol=0, atol=1e-12):
            return np.broadcast_to(critic_bias(self.noises, self.shares), self.joint.shape)
        own = [optimal_critic(p, q) for p, q in zip(self.joints, self.noises, strict=True)]
        return np.tensordot(self.shares, np.stack(own), axes=1) - self.ratio()

    def predicted_of_steps(self, negatives: float) -> Array:
        """(X, Y): the same for a merge after every step, that is for one table trained on the clients' mean loss.

        Known at the two ends. One negative makes InfoNCE a Bradley-Terry model of pairs (y, y'), of which y won
        sum_k w_k p_k(x, y) q_k(y') times. With very many negatives each client's denominator settles at its own Z_k(x),
        and exp(s) = p(x, y) / sum_k w_k p_k(x) q_k(y) / Z_k(x), where Z_k(x) = sum_y q_k(y) exp(s(x, y)).

        Args:
            negatives: 1 or inf.
        """
        weights = self.shares[:, None] * self.joints.sum(2)  # (M, X)
        won = np.einsum("m,mxy,mz->xyz", self.shares, self.joints, self.noises)  # y against z
        won = won * (1 - np.eye(self.joint.shape[1]))
        met = won + won.transpose(0, 2, 1)
        table = np.zeros_like(self.joint)
        for _ in range(20_000):
            worth = np.exp(table)
            if negatives == 1:  # Hunter 2004, "MM algorithms for generalized Bradley-Terry models"
                after = np.log(won.sum(2)) - np.log((met / (worth[:, :, None] + worth[:, None, :])).sum(2))
            else:
                z = np.einsum("my,xy->mx", self.noises, worth)
                after = np.log(self.joint) - np.log(np.einsum("mx,my->xy", weights / z, self.noises))
            after -= after.mean(1, keepdims=True)
            moved, table = float(np.abs(after - table).max()), after
            if moved < 1e-12:
                break
        return np.asarray(table - self.ratio())

    def spread(self, difference: Array) -> float:
        """The root mean square of an (X, Y) difference of critics in nats, without the c(x) that no loss sees."""
        weights = self.joint.sum(1)[:, None] * self.noise
        return float(np.sqrt((weights * self.free(difference) ** 2).sum()))

    def free(self, difference: Array) -> Array:
        """An (X, Y) difference without its mean over y, which is part of c(x)."""
        return difference - (difference @ self.noise)[:, None]


def _base(outcomes: int, rng: np.random.Generator) -> Array:
    """A joint (Y, Y) with a preference for equal outcomes."""
    p = rng.dirichlet(np.full(outcomes, 3.0), outcomes) * 0.6 + 0.4 * np.eye(outcomes)
    p = p * rng.dirichlet(np.full(outcomes, 8.0))[:, None]
    return np.asarray(p / p.sum())


def _preferring(whole: Array, clients: int, skew: float) -> Array:
    """Clients' distributions (M, Y): even outcomes are at home with everybody, each odd one with one client.

    A client draws from what is at home with the probability `skew`, else from the whole: 0 is IID, and at 1 a client
    never meets what is at home elsewhere. Without outcomes common to all, each would be rare with all clients but one,
    and the bias, much the same for all outcomes, would be lost in c(x).
    """
    y = np.arange(len(whole))
    own = (y % 2 == 0) | ((y // 2) % clients == np.arange(clients)[:, None])  # (M, Y)
    inside = np.where(own, whole, 0.0)
    found: Array = (1 - skew) * whole + skew * inside / inside.sum(1, keepdims=True)
    return found


def noise_skew(outcomes: int, clients: int, skew: float, rng: np.random.Generator) -> World:
    """One joint for all, negatives from each client's own store: the setting of T3's formula."""
    joint = _base(outcomes, rng)
    return _world(np.repeat(joint[None], clients, axis=0), _preferring(joint.sum(0), clients, skew))


def anchor_skew(outcomes: int, clients: int, skew: float, rng: np.random.Generator) -> World:
    """Clients differ in p(x), share p(y|x), and take negatives from their own batch: q_k(y) = p_k(y)."""
    joint = _base(outcomes, rng)
    return _world(_preferring(joint.sum(1), clients, skew)[:, :, None] * (joint / joint.sum(1, keepdims=True)))


def target_skew(outcomes: int, clients: int, skew: float, rng: np.random.Generator) -> World:
    """Clients differ in p(y), share p(x|y) (label shift), and take negatives from their own batch."""
    joint = _base(outcomes, rng)
    return _world(_preferring(joint.sum(0), clients, skew)[:, None, :] * (joint / joint.sum(0)))


def class_skew(outcomes: int, clients: int, skew: float, rng: np.random.Generator) -> World:
    """x and y are two views of an example of a class, clients differ in p(class); negatives from their own batch."""
    classes = max(2, 2 * outcomes // 3)
    home = np.arange(outcomes) % classes
    views = rng.dirichlet(np.full(outcomes, 6.0), classes) * (home == np.arange(classes)[:, None])
    views = 0.85 * views / views.sum(1, keepdims=True) + 0.15 / outcomes  # (C, Y), p(view | class)
    priors = _preferring(rng.dirichlet(np.full(classes, 8.0)), clients, skew)
    return _world(np.einsum("mc,cx,cy->mxy", priors, views, views))


def _world(joints: Array, noises: Array | None = None) -> World:
    return World(joints, joints.sum(1) if noises is None else noises, np.full(len(joints), 1 / len(joints)))


SETTINGS: Mapping[str, Callable[[int, int, float, np.random.Generator], World]] = {
    "own noise, common pairs": noise_skew,
    "skewed anchors p(x)": anchor_skew,
    "skewed targets p(y)": target_skew,
    "skewed classes, two views": class_skew,
}


def train(world: World, steps: int, batch: int, negatives: int, seed: int, *, every: int = 0) -> Array:
    """(X, Y): the average of tables that the clients train by stochastic gradient descent on InfoNCE.

    Args:
        world: what the clients see.
        steps: of each client.
        batch, negatives: pairs in a step, and negatives of each.
        seed: names the random streams.
        every: merge after so many steps; 0 merges once, after the last.
    """
    clients, x_size, y_size = world.joints.shape
    shares, eye = torch.from_numpy(world.shares).float(), torch.eye(y_size)
    generator = seeds.torch_stream(seed, "study", "table")
    pairs, noises = (torch.from_numpy(a).float() for a in (world.joints.reshape(clients, -1), world.noises))
    table = torch.zeros(clients, x_size, y_size)
    base = 2.5 * x_size  # p(x), about 1 / X, slows each row down
    for step in range(steps):
        drawn = torch.multinomial(pairs, batch, replacement=True, generator=generator)  # (M, B)
        others = torch.multinomial(noises, batch * negatives, replacement=True, generator=generator)
        table.requires_grad_()
        anchor = torch.stack([rows[at // y_size] for rows, at in zip(table, drawn, strict=True)])  # (M, B, Y)
        loss = info_nce(
            anchor.flatten(0, 1),
            eye[drawn % y_size].flatten(0, 1),
            eye[others].view(clients * batch, negatives, y_size),
            temperature=1.0,
            similarity="dot",
        )
        (gradient,) = torch.autograd.grad(loss.sum() / batch, table)
        rate = base * min(1.0, 2 * (1 - step / steps))  # constant, then falling to 0: the noise averages out
        table = _step(table, gradient, rate, shares if every and (step + 1) % every == 0 else None)
    return np.asarray(torch.tensordot(shares, table, dims=1).double().numpy())


@torch.no_grad()
def _step(table: Tensor, gradient: Tensor, rate: float, shares: Tensor | None) -> Tensor:
    after = table - rate * gradient
    return after if shares is None else torch.tensordot(shares, after, dims=1).expand_as(after).clone()


def fit_of(a: Array, b: Array) -> tuple[float, float]:
    """Slope of measured (P,) against predicted (P,) through the origin, and their correlation."""
    return float(a @ b / (b @ b)), float(np.corrcoef(a, b)[0, 1])
