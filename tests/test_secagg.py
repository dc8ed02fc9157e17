"""Secure aggregation: the sum is exact, one client's vector is noise, drop-outs are recovered, tampering is refused."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedssl.errors import ConfigError, ProtocolError
from fedssl.privacy.secagg import collector, keys, participant, shamir
from fedssl.privacy.secagg.chacha import Stream
from fedssl.privacy.secagg.fixed_point import FixedPoint
from fedssl.privacy.secagg.noise import discrete_gaussian
from fedssl.privacy.secagg.noise.noisy import Noisy
from fedssl.privacy.secagg.participant import Holding, Reveal, Session, Shared
from fedssl.privacy.secagg.simulate import STAGES, aggregate

RNG = np.random.default_rng(0)


def vectors(clients: int, size: int = 50, bits: int = 32, seed: int = 0) -> dict[int, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {3 * c + 1: rng.integers(0, 2**bits, size, dtype=f"u{bits // 8}") for c in range(clients)}


def total(parts: Mapping[int, np.ndarray], of: tuple[int, ...]) -> np.ndarray:
    return np.sum([parts[c] for c in of], axis=0, dtype=next(iter(parts.values())).dtype)


# The protocol


@settings(max_examples=30, deadline=None)
@given(st.integers(3, 7), st.sampled_from([32, 64]), st.data())
def test_the_sum_is_exact_whoever_drops_out(clients: int, bits: int, data: st.DataObject) -> None:
    parts = vectors(clients, 5, bits, seed=data.draw(st.integers(0, 99)))
    threshold = data.draw(st.integers(max(2, clients // 2 + 1), clients))
    who = data.draw(st.lists(st.sampled_from(sorted(parts)), max_size=clients - threshold, unique=True))
    gone = {c: data.draw(st.sampled_from(STAGES)) for c in who}
    outcome = aggregate(parts, threshold, gone)
    assert outcome.survivors == tuple(c for c in sorted(parts) if gone.get(c, "reveal") == "reveal")
    np.testing.assert_array_equal(outcome.total, total(parts, outcome.survivors))


@pytest.mark.parametrize("stage", STAGES)
def test_fewer_than_the_threshold_open_nothing(stage: str) -> None:
    parts = vectors(4)
    with pytest.raises(ProtocolError, match="2 clients .* and the threshold of secure aggregation is 3, so the sum"):
        aggregate(parts, 3, dict.fromkeys([1, 4], stage))


def test_what_the_server_sees_of_a_client_is_uniform() -> None:
    size = 200_000
    zeros = {c: np.zeros(size, np.uint32) for c in range(3)}
    seen = aggregate(zeros, 2).seen[1]
    for shift in (0, 8, 16, 24):
        counts = np.bincount((seen >> np.uint32(shift)) & np.uint32(255), minlength=256)
        assert stats.chisquare(counts).pvalue > 1e-4
    again = aggregate(zeros, 2).seen[1]
    assert not (seen == again).mean() > 1e-4  # fresh masks every time, and the same sum
    # Taking away its own mask alone, or the pairs' alone, still leaves noise: there are two.
    assert stats.pearsonr(seen.astype(float), again.astype(float)).pvalue > 1e-4


def run_to_holding(parts: Mapping[int, np.ndarray], session: Session) -> tuple[dict[int, Shared], dict[int, Holding]]:
    announced = {c: participant.advertise(c) for c in parts}
    roster = {c: one.advert for c, one in announced.items()}
    shared = {c: participant.share(one, session, roster) for c, one in announced.items()}
    graph = participant.graph_of(session, roster)
    letters = collector.deliver(graph, {c: sent for c, (_, sent) in shared.items()})
    holding = {c: participant.receive(state, letters[c]) for c, (state, _) in shared.items()}
    return {c: state for c, (state, _) in shared.items()}, holding


def test_no_client_has_both_secrets_revealed() -> None:
    parts, session = vectors(5), Session(b"run, round 1", 3, 1)
    shared, holding = run_to_holding(parts, session)
    first, second = participant.reveal(holding[1], [1, 4, 7]), participant.reveal(holding[4], [1, 4, 7])
    for answer in (first, second):
        assert set(answer.own) == {1, 4, 7}
        assert set(answer.masking) == {10, 13}
    # A server that tells two groups different survivors has too few shares of either secret: 3 of 5 are the fewest.
    other = participant.reveal(holding[10], [4, 7, 10])
    own = [r.own[1] for r in (first, second) if 1 in r.own]
    masking = [r.masking[1] for r in (other,)]
    assert len(own) < 3
    assert len(masking) < 3
    # Nothing that would open the vector remains with who answers.
    assert {f.name for f in dataclasses.fields(Holding)} == {"client", "session", "graph", "shares"}
    assert all(len(both) == 2 * shamir.SHARE_BYTES for both in holding[1].shares.values())
    secret = shared[1].me.masking_seed
    assert secret not in b"".join(holding[1].shares.values())
    assert all(word not in repr(shared[1]) for word in (repr(secret), "seed"))


@pytest.mark.parametrize("threshold", [2, 6])
def test_a_threshold_of_half_or_more_than_all_is_refused(threshold: int) -> None:
    with pytest.raises(ProtocolError, match=f"threshold of {threshold} for 5 clients is refused"):
        run_to_holding(vectors(5), Session(b"", threshold, 1))


def test_a_client_refuses_a_server_that_plays_with_the_survivors() -> None:
    parts = vectors(4)
    _, holding = run_to_holding(parts, Session(b"", 3, 1))
    with pytest.raises(ProtocolError, match="vectors of 2 clients and the threshold is 3, so client 1 reveals nothing"):
        participant.reveal(holding[1], [1, 4, 4])
    for wrong in ([4, 7, 10], [1, 4, 99]):
        with pytest.raises(ProtocolError, match="not those that client 1 shared secrets with"):
            participant.reveal(holding[1], wrong)


def test_a_client_refuses_a_roster_that_was_changed() -> None:
    announced = {c: participant.advertise(c) for c in range(3)}
    session, roster = Session(b"", 2, 1), {c: one.advert for c, one in announced.items()}
    with pytest.raises(ProtocolError, match="has other keys for it than it sent"):
        participant.share(announced[0], session, roster | {0: roster[1]})
    with pytest.raises(ProtocolError, match="one key twice"):
        participant.share(announced[0], session, roster | {2: roster[1]})
    odd = dataclasses.replace(roster[1], sealing=bytes(32))
    with pytest.raises(ProtocolError, match="no X25519 key"):
        participant.share(announced[0], session, roster | {1: odd})


def test_changed_letters_are_refused() -> None:
    announced = {c: participant.advertise(c) for c in range(3)}
    session, roster = Session(b"", 2, 1), {c: one.advert for c, one in announced.items()}
    shared = {c: participant.share(one, session, roster) for c, one in announced.items()}
    graph = participant.graph_of(session, roster)
    letters = collector.deliver(graph, {c: sent for c, (_, sent) in shared.items()})[0]
    flipped = letters[1][:-1] + bytes([letters[1][-1] ^ 1])
    swapped = {1: letters[2], 2: letters[1]}
    for wrong in (letters | {1: flipped}, letters | {1: b""}, swapped):
        with pytest.raises(ProtocolError, match="that client 1 sent to client 0 were changed on their way"):
            participant.receive(shared[0][0], wrong)
    with pytest.raises(ProtocolError, match="got shares of 0 others"):
        participant.receive(shared[0][0], {})
    with pytest.raises(ProtocolError, match="sent no shares for client 2"):
        collector.deliver(graph, {0: {1: b""}, 1: shared[1][1], 2: shared[2][1]})


@pytest.mark.parametrize("kind", ["own", "masking"])
def test_changed_shares_are_refused(kind: str) -> None:
    parts, session = vectors(4), Session(b"", 3, 1)
    shared, holding = run_to_holding(parts, session)
    survivors = [4, 7, 10]
    roster, graph = shared[1].roster, holding[1].graph
    reveals = {c: participant.reveal(holding[c], survivors) for c in survivors}
    true: dict[int, bytes] = dict(getattr(reveals[4], kind))
    owner = 7 if kind == "own" else 1
    for wrong in (bytes(17), b"\xff" * 17, b"short", None):
        forged = {k: v for k, v in (true | {owner: wrong}).items() if v is not None}
        lies: Reveal = dataclasses.replace(reveals[4], **{kind: forged})
        with pytest.raises(ProtocolError, match=f"shares of client {owner}'s secret do not give it back"):
            collector.unmask(session, roster, graph, parts, np.zeros(50, np.uint32), survivors, reveals | {4: lies})


def test_sessions_do_not_mix() -> None:
    shared = keys.derive(b"secret")
    letter = keys.seal(shared, b"round 1", 0, 1, b"text")
    assert keys.unseal(shared, b"round 1", 0, 1, letter) == b"text"
    for name, sender, recipient in ((b"round 2", 0, 1), (b"round 1", 1, 0)):
        with pytest.raises(ProtocolError):
            keys.unseal(shared, name, sender, recipient, letter)


@given(st.binary(min_size=16, max_size=16), st.integers(2, 6), st.integers(0, 3), st.randoms(use_true_random=False))
@settings(max_examples=20, deadline=None)
def test_any_threshold_of_shares_give_the_secret(secret: bytes, threshold: int, more: int, random: object) -> None:
    shares = dict(enumerate(shamir.split(secret, threshold, threshold + more)))
    chosen = random.sample(sorted(shares), threshold)  # type: ignore[attr-defined]
    assert shamir.combine({i: shares[i] for i in chosen}, threshold) == secret
    with pytest.raises(ProtocolError, match="are needed"):
        shamir.combine({i: shares[i] for i in chosen[1:]}, threshold)


# Real numbers


@settings(max_examples=40, deadline=None)
@given(st.floats(1e-3, 1e4), st.integers(2, 5000), st.sampled_from([32, 64]))
def test_no_sum_wraps(limit: float, clients: int, bits: int) -> None:
    grid = FixedPoint.fit(limit, clients, bits)
    ends = np.array([limit, -limit, 0.0])
    residues = sum((grid.encode(ends, Stream.of(0)) for _ in range(2)), np.zeros(3, f"u{bits // 8}"))
    np.testing.assert_allclose(grid.mean(residues, 2), ends, atol=grid.step)
    assert clients * grid.largest < 2 ** (bits - 1)
    assert 4 * clients * (limit / grid.step + 1) >= 2 ** (bits - 1) / 2  # and the grid is no coarser than need be
    assert math.frexp(grid.step)[0] == 0.5


def test_rounding_is_unbiased_and_reproducible() -> None:
    grid = FixedPoint(0.25, 1000, 32, 8.0)
    values = np.full(40_000, -0.6)
    rounded = grid.round(values, Stream.of(1, "client", 2))
    assert set(np.unique(rounded)) == {-3, -2}
    assert abs(rounded.mean() * 0.25 + 0.6) < 4 * 0.25 * math.sqrt(0.24 / 40_000)
    np.testing.assert_array_equal(rounded, grid.round(values, Stream.of(1, "client", 2)))
    assert (rounded != grid.round(values, Stream.of(1, "client", 3))).any()


@pytest.mark.parametrize("value", [8.01, -20.0, math.nan, math.inf])
def test_a_value_out_of_range_raises(value: float) -> None:
    grid = FixedPoint.fit(8.0, 10, 32)
    with pytest.raises(ProtocolError, match=r"larger than aggregation.limit=8, .* raise the limit") as refusal:
        grid.encode(np.array([0.0, value]), Stream.of(0))
    assert str(value) not in str(refusal.value)  # the server reads it


def test_grids_that_make_no_sense_are_refused() -> None:
    for limit, clients, bits in ((0.0, 3, 32), (math.inf, 3, 32), (1.0, 0, 32), (1.0, 3, 16)):
        with pytest.raises(ConfigError, match="makes no grid"):
            FixedPoint.fit(limit, clients, bits)
    with pytest.raises(ConfigError, match="does not fit 32 bits: use aggregation.bits=64"):
        FixedPoint.fit(1.0, 2**30, 32)
    with pytest.raises(ProtocolError, match="could wrap"):
        FixedPoint(1.0, 5, 32, 9.0).residues(np.array([-6]))


# Noise


@pytest.mark.parametrize("deviation", [1, 2, 7])
def test_the_sampler_has_the_discrete_gaussian_distribution(deviation: int) -> None:
    count = 60_000
    drawn = discrete_gaussian.draw(deviation, count, Stream.of(deviation))
    support = np.arange(-12 * deviation, 12 * deviation + 1)
    mass = np.exp(-(support**2) / (2 * deviation**2))
    mass /= mass.sum()
    expected, seen = mass * count, np.array([(drawn == z).sum() for z in support])
    usual = expected >= 5
    assert seen.sum() == count
    rest = (seen[~usual].sum(), expected[~usual].sum())
    f = np.append(seen[usual], rest[0]), np.append(expected[usual], rest[1])
    assert stats.chisquare(*f).pvalue > 1e-3


def test_large_deviations_are_normal() -> None:
    for deviation in (10**5, discrete_gaussian.LARGEST):
        drawn = discrete_gaussian.draw(deviation, 20_000, Stream.of(4))
        assert stats.kstest(drawn / deviation, "norm").pvalue > 1e-3
    for deviation in (0, discrete_gaussian.LARGEST + 1):
        with pytest.raises(ConfigError, match="is refused"):
            discrete_gaussian.draw(deviation, 1, Stream.of(0))


def test_words_are_those_of_rfc_8439_and_uniform_below_any_bound() -> None:
    # Appendix A.1, test vector 1: a key of zeros, the first block.
    assert Stream(bytes(32)).words(2, 32).astype("<u4").tobytes().hex() == "76b8e0ada0f13d90"
    drawn = Stream.of(1).below(7, 70_000)
    assert stats.chisquare(np.bincount(drawn, minlength=7)).pvalue > 1e-3
    assert Stream.of(1).below(2**63, 3).min() >= 0
    assert (Stream.from_system().words(4) != Stream.from_system().words(4)).all()
    with pytest.raises(ProtocolError, match="key of 3 bytes"):
        Stream(b"key")


def test_the_fewest_survivors_have_the_wanted_noise() -> None:
    clip, multiplier, dim, clients, fewest = 1.0, 0.7, 20_000, 6, 4
    noisy = Noisy.fit(clip, multiplier, dim, clients, fewest, 32)
    values = {c: RNG.normal(size=dim) for c in range(clients)}  # of norm 141: clipped to 1
    residues = {c: noisy.encode(v, Stream.of(5, c)) for c, v in values.items()}
    outcome = aggregate(residues, fewest, {0: "mask", 3: "share"})
    exact = sum(values[c] / np.linalg.norm(values[c]) for c in outcome.survivors)
    error = noisy.grid.total(outcome.total) * noisy.grid.step - exact
    wanted = multiplier * noisy.norm * noisy.grid.step
    assert len(outcome.survivors) == fewest
    assert wanted >= multiplier * clip
    assert abs(error.std() / wanted - 1) < 4 / math.sqrt(2 * dim)
    assert noisy.rho == pytest.approx(1 / (2 * multiplier**2), rel=1e-5)
    # Clipped before it is hidden: without noise the sum would have the norm of the clipped.
    assert np.linalg.norm(exact) <= fewest * clip


def test_the_norm_is_inflated_for_rounding_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = FixedPoint(0.25, 100, 32, 2.5)
    noisy = Noisy(grid, 2.5, 400, 3, 2)
    assert noisy.norm == pytest.approx(math.sqrt(10**2 + 400 / 4 + 10 + 20 / 2))
    half = np.full(400, 0.125)  # of norm 2.5, and as far from the grid as can be
    first = [np.linalg.norm(grid.round(half, Stream.of(seed))) for seed in range(1000)]
    monkeypatch.setattr(discrete_gaussian, "draw", lambda deviation, count, stream: np.zeros(count, np.int64))
    sent = [np.linalg.norm(grid.total(noisy.encode(half, Stream.of(seed)))) for seed in range(1000)]
    assert max(first) > noisy.norm >= max(sent)


def test_noise_that_makes_no_sense_is_refused() -> None:
    for clip, multiplier, fewest in ((0.0, 1.0, 2), (1.0, 0.0, 2), (1.0, 1.0, 9)):
        with pytest.raises(ConfigError, match="is no mechanism"):
            Noisy.fit(clip, multiplier, 10, 5, fewest, 32)
    with pytest.raises(ConfigError, match="does not fit 32 bits"):
        Noisy.fit(1.0, 1e7, 10**6, 5, 3, 32)
    with pytest.raises(ProtocolError, match="no norm to clip"):
        Noisy.fit(1.0, 1.0, 1, 5, 3, 32).encode(np.array([math.nan]), Stream.of(0))
