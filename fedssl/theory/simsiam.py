"""SimSiam with one weight in the encoder and one in the predictor (T8): where stop-gradient changes stability.

The model. x has mean 0 and the second moment v; its views are x_i = x + n_i, independent noises of the variance s.
Write c = v + s for a view's second moment and kappa = v / c for the correlation of two views. Encoder z_i = w x_i,
predictor q_i = p z_i. The losses, each with `weight_decay / 2 * (w^2 + p^2)` added:

    "mse":  L = E[(q_1 - z_2)^2] / 2 = w^2 (c p^2 - 2 v p + c) / 2
    "dot":  L = -E[q_1 z_2]          = -v p w^2

(both views' roles give equal terms). Gradient flow is w' = -dL/dw, p' = -beta dL/dp; with stop-gradient dL/dw leaves
out the path through the target z_2. The predictor's equation is the same either way:

                 with stop-gradient          without
    mse  dL/dw   w p (c p - v)               w (c p^2 - 2 v p + c)
         dL/dp   w^2 (c p - v)               the same
    dot  dL/dw   -v p w                      -2 v p w
         dL/dp   -v w^2                      the same

What is found, by the eigenvalues and not by the words of the text:

- At the collapsed point w = 0 the Jacobian is diagonal; the encoder's eigenvalue is `p (v - c p) - weight_decay` with
  stop-gradient. Without weight decay collapse is therefore unstable exactly for predictors 0 < p < kappa, and stable
  for p < 0 and p > kappa: an identity predictor, p = 1, lets noisy views collapse. Without stop-gradient it is
  `-(c p^2 - 2 v p + c) - weight_decay`, never above 0 (it is 0 only for s = 0, p = 1): collapse is stable for every
  predictor, most weakly, at the rate `-(c - v^2 / c)`, for p = kappa. So under the squared error stop-gradient *opens*
  the instability that saves the encoder; the text claims the reverse, that collapse is unstable without it and stable
  with it.
- Under the dot product the eigenvalues are `v p` and `2 v p`, minus the weight decay: both unstable for p > 0 and
  stable for p < 0. Stop-gradient only halves the rate. What the text says of the case without it holds here, but what
  escapes from collapse then grows without bound.
- With weight decay d and a trained predictor, both losses keep (0, 0) as an attractor, eigenvalues -d and -beta d, with
  or without stop-gradient: stop-gradient does not make that point unstable. It creates (mse) a second pair of
  attractors, w = +-p with `c p^2 - v p + d = 0`, larger root, as long as d < v^2 / (4 c); the smaller root is a saddle
  on the border of the basins. More weight decay or noise leaves only collapse. (dot: there is only a saddle, beyond
  which weights run away.)
- Without weight decay and with stop-gradient, `w^2 - p^2 / beta` never changes (mse), so the end is known from the
  start: collapse iff it is at most `-kappa^2 / beta`, or below 0 with p < 0.
- Clients that average their weights after local training of length T leave collapse at the rate
  `log(sum_k share_k exp(rate_k T)) / T`, from the mean of their own rates (T small) up to the largest (T large): one
  client with clean views saves all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedssl.errors import ConfigError
from fedssl.theory.checks import Array, at_least, not_negative, positive, shares


@dataclass(frozen=True)
class LinearSimSiam:
    """The scalar model of this module; see there for its losses and for what they do.

    Args:
        signal: v, the second moment of x, > 0.
        noise: s, the variance that the augmentation adds to each view, >= 0.
        weight_decay: of both weights, >= 0.
        stop_gradient: whether the target's path is left out of dL/dw.
        predictor_rate: beta, how much faster than the encoder the predictor learns, >= 0; 0 holds it fixed.
        loss: "mse" or "dot".

    Raises:
        ConfigError: a number out of range or an unknown loss.
    """

    signal: float = 1.0
    noise: float = 0.5
    weight_decay: float = 0.0
    stop_gradient: bool = True
    predictor_rate: float = 1.0
    loss: str = "mse"

    def __post_init__(self) -> None:
        positive("signal", self.signal)
        for name in ("noise", "weight_decay", "predictor_rate"):
            not_negative(name, getattr(self, name))
        if self.loss not in ("mse", "dot"):
            raise ConfigError(f"The loss {self.loss!r} is not known; use 'mse' or 'dot'.")

    @property
    def correlation(self) -> float:
        """kappa = v / (v + s), of two views; the predictor that predicts best."""
        return self.signal / (self.signal + self.noise)

    def flow(self, w: ArrayLike, p: ArrayLike) -> tuple[Array, Array]:
        """(w', p') of the gradient flow, of the broadcast shape of encoder w and predictor p."""
        w, p = np.asarray(w, dtype=np.float64), np.asarray(p, dtype=np.float64)
        v, c, d, beta = self.signal, self.signal + self.noise, self.weight_decay, self.predictor_rate
        if self.loss == "mse":
            dw = w * (p * (c * p - v) if self.stop_gradient else c * p * p - 2 * v * p + c)
            dp = w * w * (c * p - v)
        else:
            dw = -v * p * w * (1 if self.stop_gradient else 2)
            dp = -v * w * w
        return -(dw + d * w), -beta * (dp + d * p)

    def jacobian(self, w: float, p: float) -> Array:
        """(2, 2): row 0 the derivatives of w' with respect to w and p, row 1 those of p'."""
        v, c, d, beta = self.signal, self.signal + self.noise, self.weight_decay, self.predictor_rate
        if self.loss == "mse":
            pw, pp = 2 * w * (c * p - v), c * w * w
            if self.stop_gradient:
                ww, wp = p * (c * p - v), w * (2 * c * p - v)
            else:
                ww, wp = c * p * p - 2 * v * p + c, w * (2 * c * p - 2 * v)
        else:
            factor = 1 if self.stop_gradient else 2
            ww, wp, pw, pp = -factor * v * p, -factor * v * w, -2 * v * w, 0.0
        return 0.0 - np.array([[ww + d, wp], [beta * pw, beta * (pp + d)]], dtype=np.float64)


@dataclass(frozen=True)
class FixedPoint:
    """A point of the linear model and what the Jacobian there says."""

    encoder: float  # w
    predictor: float  # p
    jacobian: Array  # (2, 2)
    eigenvalues: NDArray[np.complex128]  # (2,), largest real part first
    encoder_rate: float  # d w' / d w: the growth of a small w while p is held, the eigenvalue the text speaks of

    @property
    def stability(self) -> str:
        """Both real parts below 0: "stable"; one above 0: "unstable"; else "marginal", as on a line of fixed points.

        The collapsed point is on such a line without weight decay; there `encoder_rate` below 0 says that it attracts.
        """
        top, size = float(self.eigenvalues[0].real), float(np.abs(self.jacobian).max())
        if abs(top) <= 1e-9 * max(size, 1e-300):
            return "marginal"
        return "stable" if top < 0 else "unstable"


def linear_simsiam(predictor: float, model: LinearSimSiam | None = None) -> list[FixedPoint]:
    """Lists the fixed points of the linear model, with Jacobian and eigenvalues, as a function of the predictor.

    Args:
        predictor: p at the collapsed point, which exists for every p without weight decay or with
            `predictor_rate=0`. With weight decay a trained predictor decays too: then w = 0, p is at rest only at
            p = 0, and elsewhere the first eigenvalues describe the encoder while p changes slowly.
        model: the model; None takes the default one.

    Returns:
        First the collapsed point (0, p). Then the non-trivial ones, w > 0 (each has a mirror image at -w), the one with
        the largest p first; none where there is none. Where whole lines are at rest (mse, no weight decay), their
        point with w = 1 stands for them. With `predictor_rate=0` the flow is linear in w, and none are listed.

    Raises:
        ConfigError: a predictor that is not finite.
    """
    m = model or LinearSimSiam()
    if not math.isfinite(predictor):
        raise ConfigError(f"The predictor is {predictor}; pass a finite weight.")
    return [_fixed_point(m, w, p) for w, p in [(0.0, float(predictor)), *_nontrivial(m)]]


def simulate_linear_simsiam(
    encoder: ArrayLike,
    predictor: ArrayLike,
    models: LinearSimSiam | Sequence[LinearSimSiam],
    *,
    rate: float,
    steps: int,
    rounds: int = 1,
    weights: ArrayLike | None = None,
) -> Array:
    """Descends the exact gradients of one or several clients, averaging their weights after every round.

    Args:
        encoder: w at the start, one number or (M,).
        predictor: p at the start, one number or (M,).
        models: one model for all M clients or one for each; clients may differ in noise or signal.
        rate: step size, > 0; the predictor's is `predictor_rate` times it.
        steps: local steps a round, >= 1.
        rounds: >= 1; after each, every client holds the weighted average.
        weights: (M,), >= 0; None weighs clients alike.

    Returns:
        (1 + rounds * steps, M, 2): w and p at the start and after every step, those at the end of a round after the
        averaging. Values may overflow to inf or nan where the flow has no bound (loss "dot") or the rate is too large.
        Averages of w and -w, equally good encoders, are collapsed: clients need a common start.

    Raises:
        ConfigError: a number out of range, or numbers of clients that do not fit.
    """
    rate, steps, rounds = positive("rate", rate), at_least("steps", steps, 1), at_least("rounds", rounds, 1)
    given = [models] if isinstance(models, LinearSimSiam) else list(models)
    w, p = np.atleast_1d(np.asarray(encoder, np.float64)), np.atleast_1d(np.asarray(predictor, np.float64))
    clients = max(len(given), w.size, p.size)
    if w.ndim != 1 or p.ndim != 1 or {len(given), w.size, p.size} - {1, clients}:
        raise ConfigError(
            f"There are {len(given)} models, encoders {w.shape} and predictors {p.shape}; give one of each, or one for "
            "each client."
        )
    share = shares(weights, clients)
    state = np.stack(np.broadcast_arrays(w, p, np.ones(clients))[:2], axis=1)  # (M, 2)
    found = [state]
    with np.errstate(over="ignore", invalid="ignore"):
        for step in range(1, rounds * steps + 1):
            if len(given) == 1:
                move = np.stack(given[0].flow(state[:, 0], state[:, 1]), axis=1)
            else:
                move = np.array([m.flow(a, b) for m, (a, b) in zip(given, state, strict=True)])
            state = state + rate * move
            if step % steps == 0:
                state = np.tile(share @ state, (clients, 1))
            found.append(state)
    return np.stack(found)


def averaged_rate(rates: ArrayLike, time: float, weights: ArrayLike | None = None) -> float:
    """Gives the rate at which a small w grows when clients average after local training of a given length.

    Args:
        rates: (M,), each client's `encoder_rate`, its predictor being held.
        time: T > 0, number of local steps times step size.
        weights: (M,), >= 0; None weighs clients alike.

    Returns:
        `log(sum_k share_k exp(rate_k T)) / T`: at least the mean of the rates, at most the largest.

    Raises:
        ConfigError: rates that are not finite, weights that do not fit, or a time that is not above 0.
    """
    r = np.atleast_1d(np.asarray(rates, dtype=np.float64))
    if r.ndim != 1 or r.size == 0 or not np.all(np.isfinite(r)):
        raise ConfigError(f"The rates are {r.tolist()}; pass one finite number for each client.")
    share, t = shares(weights, len(r)), positive("time", time)
    r, share = r[share > 0], share[share > 0]
    return float(np.logaddexp.reduce(r * t + np.log(share))) / t


def _nontrivial(m: LinearSimSiam) -> list[tuple[float, float]]:
    """(w, p) with w > 0 at which both equations rest."""
    v, c, d = m.signal, m.signal + m.noise, m.weight_decay
    if m.predictor_rate == 0:
        return []
    if m.loss == "dot":
        p = d / (v if m.stop_gradient else 2 * v)
        return [(math.sqrt(d * p / v), p)] if d > 0 else []
    if d == 0:  # a line of points: every w, at the best predictor
        return [(1.0, m.correlation)] if m.stop_gradient or m.noise == 0 else []
    root = v * v - 4 * c * d
    if not m.stop_gradient or root < 0:
        return []
    pair = {(v + math.sqrt(root)) / (2 * c), (v - math.sqrt(root)) / (2 * c)}
    return [(p, p) for p in sorted(pair, reverse=True)]


def _fixed_point(m: LinearSimSiam, w: float, p: float) -> FixedPoint:
    matrix = m.jacobian(w, p)
    values = np.linalg.eigvals(matrix).astype(np.complex128)
    return FixedPoint(w, p, matrix, values[np.argsort(-values.real, kind="stable")], float(matrix[0, 0]))
