"""Who owns which array: the strategy's overrides, their order, and every refusal."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from fedssl.errors import ConfigError, PrivacyError
from fedssl.parts import Coupling, Part, Share, part_of, resolve_shares

PARTS = (
    Part("encoder"),
    Part("predictor"),
    Part("teacher", trainable=False, share=Share.derived, follows=("encoder",)),
    Part("queue", trainable=False, share=Share.local, holds_examples=True),
)
KEYS = (
    "encoder.conv.weight",
    "encoder.bn.weight",
    "encoder.bn.running_mean",
    "predictor.0.weight",
    "predictor.1.weight",
    "teacher.encoder.conv.weight",
    "teacher.encoder.bn.weight",
    "teacher.encoder.bn.running_mean",
    "queue.rows",
)
NORMS = frozenset(key for key in KEYS if ".bn." in key or key == "predictor.1.weight")
M, L, D = Share.merge, Share.local, Share.derived
DEFAULT = [M, M, M, M, M, D, D, D, L]


def resolve(override: Mapping[str, str], parts: tuple[Part, ...] = PARTS) -> list[Share]:
    shares = resolve_shares(parts, override, KEYS, NORMS)
    assert list(shares) == list(KEYS)
    return list(shares.values())


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ({}, DEFAULT),
        ({"encoder": "merge"}, DEFAULT),
        ({"predictor": "local"}, [M, M, M, L, L, D, D, D, L]),
        ({"*:norm": "local"}, [M, L, L, M, L, D, D, D, L]),
        ({"encoder:norm": "local"}, [M, L, L, M, M, D, D, D, L]),
        ({"encoder": "local", "*:norm": "merge"}, [L, M, M, M, M, D, D, D, L]),
        ({"*:norm": "merge", "encoder": "local"}, [L, M, M, M, M, D, D, D, L]),
        ({"*:norm": "local", "encoder:norm": "merge"}, [M, M, M, M, L, D, D, D, L]),
        ({"encoder:norm": "merge", "*:norm": "local"}, [M, M, M, M, L, D, D, D, L]),
        ({"encoder": "local", "*:norm": "local", "encoder:norm": "merge"}, [L, M, M, M, L, D, D, D, L]),
        ({"teacher": "local"}, [M, M, M, M, M, L, L, L, L]),
        ({"teacher": "merge"}, [M, M, M, M, M, M, M, M, L]),
        ({"teacher": "merge", "*:norm": "local"}, [M, L, L, M, L, M, L, L, L]),
        ({"teacher": "local", "*:norm": "merge"}, [M, M, M, M, M, L, M, M, L]),
        ({"teacher": "local", "teacher:norm": "merge"}, [M, M, M, M, M, L, M, M, L]),
        ({"queue": "local", "*:norm": "merge"}, DEFAULT),
    ],
)
def test_the_most_specific_override_wins(override: dict[str, str], expected: list[Share]) -> None:
    assert resolve(override) == expected


def test_a_derived_part_is_one_piece_however_that_was_said() -> None:
    """`teacher=derived` is what the method declares anyway, so saying it changes nothing."""
    said = resolve({"teacher": "derived", "*:norm": "local"})
    assert said == resolve({"*:norm": "local"})
    followers = tuple(Part(p.name, share=M if p.name == "teacher" else p.share, follows=p.follows) for p in PARTS)
    assert resolve({"teacher": "derived", "*:norm": "local"}, followers)[5:8] == [D, D, D]


def test_an_override_inside_a_derived_part_is_never_ignored() -> None:
    with pytest.raises(ConfigError, match="teacher:norm"):
        resolve({"teacher:norm": "local"})


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ({"projector": "local"}, "share.projector names no part"),
        ({"Encoder": "local"}, "use one of encoder, predictor, teacher, queue"),
        ({"": "local"}, "names no part"),
        ({"*": "local"}, r"share.\* names no part"),
        ({"*:": "local"}, "names no part"),
        ({"encoder:": "local"}, "names no part"),
        ({"encoder:bias": "local"}, "names no part"),
        ({"encoder:norm:norm": "local"}, "names no part"),
        ({"norm": "local"}, "names no part"),
        ({":norm": "local"}, "names no part"),
        ({"encoder.bn": "local"}, "names no part"),
        ({"encoder": "Local"}, "is not merge, local or derived"),
        ({"encoder": ""}, "is not merge, local or derived"),
        ({"encoder": None}, "is not merge, local or derived"),
        ({"encoder": 1}, "is not merge, local or derived"),
        ({"encoder": "derived"}, "use merge or local"),
        ({"*:norm": "derived"}, "use merge or local"),
        ({"teacher:norm": "derived"}, "use merge or local"),
        ({"predictor": "local", "encoder": "share"}, "share.encoder='share'"),
    ],
)
def test_a_wrong_override_is_one_sentence(override: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        resolve(override)
    assert "\n" not in str(caught.value)


def test_a_part_that_holds_examples_never_leaves() -> None:
    with pytest.raises(PrivacyError, match="share.queue=local"):
        resolve({"queue": "merge"})
    careless = (*PARTS[:3], Part("queue", holds_examples=True))
    with pytest.raises(PrivacyError, match="'queue' holds embeddings"):
        resolve({}, careless)
    assert resolve({"queue": "local"}, careless) == DEFAULT
    with pytest.raises(PrivacyError):
        resolve_shares(
            careless, {"queue": "local", "*:norm": "merge"}, ["queue.bn.weight"], frozenset({"queue.bn.weight"})
        )


def test_part_of_is_the_first_component() -> None:
    assert part_of("encoder.stem.weight") == "encoder"
    assert part_of("teacher.encoder.stem.weight") == "teacher"
    assert part_of("center") == "center"


def test_the_words_of_a_configuration_are_the_members() -> None:
    assert [str(share) for share in Share] == ["merge", "local", "derived", "received"]
    assert [str(coupling) for coupling in Coupling] == ["none", "batch", "history"]
    assert Share("merge") is Share.merge
