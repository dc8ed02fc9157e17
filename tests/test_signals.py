"""Sources of time series: the table, what is held out, files of every format, and the real data where they are."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedssl import config
from fedssl.datasets.base import Data, DataSource, Table
from fedssl.datasets.signals.division import divided, whole_units
from fedssl.datasets.signals.drawn import WAVES, SyntheticSignals
from fedssl.datasets.signals.npz import SignalsNpz
from fedssl.datasets.signals.table import Signals, as_signals, numbered
from fedssl.datasets.signals.uci_har import CHANNELS, UciHar, runs
from fedssl.datasets.signals.ucr import Ucr
from fedssl.errors import ConfigError
from fedssl.partition import natural

REAL = Path(os.environ.get("FEDSSL_DATA", Path(__file__).parents[2] / "shared" / "data"))


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def table(n: int = 8, channels: int = 2, steps: int = 5) -> Signals:
    values = torch.arange(float(n * channels * steps)).view(n, channels, steps)
    return Signals(values, np.arange(n) % 3, np.array(list("abcdefgh"))[:n])


def halves(data: Signals) -> set[bytes]:
    """The first and second half of every window, as bytes: overlapping windows share one."""
    x = data.signals.numpy()
    middle = x.shape[2] // 2
    return {half.tobytes() for window in x for half in (window[:, :middle].copy(), window[:, middle:].copy())}


# --- the table


def test_a_batch_is_a_copy_of_the_chosen_rows() -> None:
    data = table()
    out = data.batch(torch.tensor([1, 0, 1]))
    assert out.dtype == torch.float32
    assert torch.equal(out[0], data.signals[1])
    out.zero_()
    assert float(data.signals[1].abs().sum()) > 0
    assert (data.shape, len(data), data.device.type, len(data.to("cpu"))) == ((2, 5), 8, "cpu", 8)
    shard = data.shard(np.array([6, 2]), 0)
    assert torch.equal(shard.batch(torch.tensor([1])), data.signals[2:3])


def test_a_subset_keeps_labels_and_groups_with_their_series() -> None:
    part = table().subset(np.array([3, 1]))
    assert part.targets is not None
    assert part.groups is not None
    assert (part.targets.tolist(), part.groups.tolist()) == ([0, 1], ["d", "b"])
    assert Signals(part.signals).subset(torch.tensor([0])).targets is None


def test_the_constants_are_those_of_each_channel() -> None:
    x = rng().normal(3, 2, (50, 2, 40)).astype(np.float32)
    mean, std = Signals(torch.from_numpy(x)).constants()
    assert mean == pytest.approx(x.mean((0, 2)), abs=1e-5)
    assert std == pytest.approx(x.std((0, 2)), abs=1e-5)


@pytest.mark.parametrize(
    ("signals", "targets", "words"),
    [
        (torch.zeros(2, 2), None, "shape"),
        (torch.zeros(2, 1, 2, dtype=torch.float64), None, "float32"),
        (torch.zeros(0, 1, 2), None, "no series"),
        (torch.zeros(2, 1, 0), None, "no series"),
        (torch.tensor([[[0.0, 1.0]], [[float("nan"), 1.0]]]), None, "1 of 2 series .* the first is series 1"),
        (torch.full((2, 1, 2), float("inf")), None, "not finite"),
        (torch.zeros(2, 1, 2), np.zeros(3, np.int64), "one per example"),
        (torch.zeros(2, 1, 2), np.array([0, -1]), "from 0 on"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(signals: torch.Tensor, targets: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Signals(signals, targets)


def test_every_layout_becomes_channels_first() -> None:
    x = rng().normal(size=(4, 3, 7))
    first, last, single = (
        as_signals(x, False, "x"),
        as_signals(x.transpose(0, 2, 1), True, "x"),
        as_signals(x[:, 0], True, "x"),
    )
    assert torch.equal(first, last)
    assert torch.equal(single, first[:, :1])
    assert as_signals(np.ones((2, 3), np.int16), False, "x").dtype == torch.float32
    for bad, words in ((np.zeros((2, 3, 4, 5)), "shape"), (np.zeros((2, 3), complex), "real numbers")):
        with pytest.raises(ConfigError, match=words):
            as_signals(bad, False, "x")


@pytest.mark.parametrize(
    ("labels", "names", "numbers", "classes"),
    [
        ([2, 0, 1], ("a", "b", "c"), [2, 0, 1], ("a", "b", "c")),
        ([0, 0, 1], ("a", "b", "c"), [0, 0, 1], ("a", "b", "c")),
        ([3, 1, 2], ("a", "b", "c"), [2, 0, 1], ("a", "b", "c")),
        ([30, 10], (), [1, 0], ("10", "30")),
        ([-1, 1], (), [0, 1], ("-1", "1")),
        (["walk", "sit", "walk"], (), [1, 0, 1], ("sit", "walk")),
        ([1.0, 2.0], (), [0, 1], ("1", "2")),
        ([[1], [0]], (), [1, 0], ("0", "1")),
        ([True, False], (), [1, 0], ("False", "True")),
    ],
)
def test_labels_of_any_kind_are_numbered(labels: Any, names: Any, numbers: list[int], classes: Any) -> None:
    found, named = numbered(np.array(labels), names, "x")
    assert found is not None
    assert found.dtype == np.int64
    assert (found.tolist(), named) == (numbers, classes)


def test_labels_that_are_none_or_make_no_sense() -> None:
    assert numbered(None, ("a",), "x") == (None, ())
    for bad in (np.array([0.5, 1.0]), np.zeros((2, 2), np.int64), np.array([1j])):
        with pytest.raises(ConfigError, match="one whole number or word"):
            numbered(bad, (), "x")


# --- what is held out


def test_whole_recordings_are_held_out_and_every_group_keeps_one() -> None:
    groups = np.repeat(np.arange(6), 10)
    recordings = groups * 10 + np.tile(np.repeat(np.arange(5), 2), 6)
    recordings[:10] = 0  # the first group has one recording
    train, test = whole_units(groups, recordings, 0.2)
    assert np.array_equal(np.sort(np.concatenate([train, test])), np.arange(60))
    assert not set(recordings[train]) & set(recordings[test])
    assert np.bincount(groups[test], minlength=6).tolist() == [0, 2, 2, 2, 2, 2]
    assert np.array_equal(whole_units(groups, recordings, 0.2)[1], test), "always the same"
    assert len(whole_units(groups, recordings, 0.99)[0]) == 10 + 5 * 2, "one always stays"
    with pytest.raises(ConfigError, match="no group has two recordings"):
        whole_units(groups, groups, 0.2)


def data_of(held: Any = None, recordings: Any = None, groups: Any = "own", test: str = "auto") -> Data:
    n = 60
    x = torch.arange(float(n)).view(n, 1, 1).expand(n, 1, 2).contiguous()
    own = np.repeat(np.arange(6), 10) if isinstance(groups, str) else groups
    whole = Signals(x, np.arange(n) % 3, own)
    return divided(whole, ("a", "b", "c"), test, 0.2, held, recordings)


def rows(part: Signals) -> list[int]:
    return part.signals[:, 0, 0].int().tolist()


def test_the_data_decide_what_auto_holds_out() -> None:
    held = np.arange(60) >= 50
    assert rows(data_of(held).test) == list(range(50, 60))
    by_group = data_of()
    assert len(by_group.test) == 10
    assert not set(by_group.train.groups) & set(by_group.test.groups)
    at_random = data_of(groups=None)
    assert np.bincount(at_random.test.targets).tolist() == [4, 4, 4]
    assert len(data_of(groups=np.zeros(60, np.int64)).test) == 12, "one group cannot be divided"
    recordings = np.arange(60) // 5
    by_recording = data_of(recordings=recordings, test="recordings")
    assert np.bincount(by_recording.test.groups).tolist() == [5] * 6
    assert rows(data_of(held, recordings, test="random").test) == rows(data_of(groups=None, test="random").test)


@pytest.mark.parametrize(
    ("test", "words"),
    [("file", "no division of its own"), ("recordings", "no recordings"), ("groups", "no groups")],
)
def test_a_division_that_the_data_lack_is_refused(test: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        data_of(groups=None, test=test)


@pytest.mark.parametrize("held", [np.zeros(60, bool), np.ones(60, bool)])
def test_an_empty_part_is_refused(held: Any) -> None:
    with pytest.raises(ConfigError, match="both need some"):
        data_of(held)


# --- .npz


def write(folder: Path, **arrays: Any) -> str:
    path = folder / "data.npz"
    np.savez(path, **arrays)
    return str(path)


X = rng().normal(size=(20, 3, 8)).astype(np.float32)
Y = np.arange(20) % 2


def test_one_table_with_its_division(tmp_path: Path) -> None:
    held = np.arange(20) < 5
    path = write(tmp_path, signals=X, labels=Y, subjects=np.arange(20) // 2, is_test=held, class_names=["a", "b"])
    data = SignalsNpz(path).load()
    assert torch.equal(data.test.signals, torch.from_numpy(X[:5]))
    assert (data.test.targets.tolist(), data.classes) == (Y[:5].tolist(), ("a", "b"))
    assert data.train.groups.tolist() == (np.arange(20) // 2)[5:].tolist()


@pytest.mark.parametrize(
    "names",
    [
        ("train_signals", "test_signals", "train_labels", "test_labels"),
        ("x_train", "x_test", "y_train", "y_test"),
        ("X_train", "X_test", "Y_train", "Y_test"),
    ],
)
@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
def test_two_tables_under_the_usual_names(tmp_path: Path, names: tuple[str, ...], layout: str) -> None:
    x = X.astype(np.float64) if layout == "channels_first" else X.transpose(0, 2, 1)
    path = write(tmp_path, **dict(zip(names, (x[:15], x[15:], Y[:15] + 1, Y[15:] + 1), strict=True)))
    data = SignalsNpz(path, layout=layout).load()
    assert torch.equal(data.train.signals, torch.from_numpy(X[:15]))
    assert torch.equal(data.test.signals, torch.from_numpy(X[15:]))
    assert (data.test.targets.tolist(), data.classes) == (Y[15:].tolist(), ("1", "2"))


def test_a_file_without_division_holds_out_groups_or_a_share_of_each_class(tmp_path: Path) -> None:
    users = np.repeat(np.arange(10), 2)
    grouped = SignalsNpz(write(tmp_path, x=X[:, 0], y=Y, users=users)).load()
    assert (grouped.train.shape, len(grouped.test)) == ((1, 8), 4)
    assert not set(grouped.train.groups) & set(grouped.test.groups)
    plain = SignalsNpz(write(tmp_path, x=X, y=Y)).load()
    assert np.bincount(plain.test.targets).tolist() == [2, 2]
    unlabelled = SignalsNpz(write(tmp_path, signals=X), test_fraction=0.4).load()
    assert (unlabelled.train.targets, unlabelled.classes, len(unlabelled.test)) == (None, (), 8)


def test_columns_are_found_by_a_name_that_is_given(tmp_path: Path) -> None:
    where, visit = np.arange(20) // 10, np.arange(20) // 5
    path = write(tmp_path, signals=X, labels=Y, hospital=where[:, None], visit=visit)
    data = SignalsNpz(path, groups="hospital", recordings="visit", test="recordings").load()
    assert np.bincount(data.test.groups).tolist() == [5, 5]
    for wrong in ({"groups": "ward"}, {"recordings": "ward"}):
        with pytest.raises(ConfigError, match="ward"):
            SignalsNpz(path, **wrong).load()


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"pictures": X}, "name the series"),
        ({"x_train": X}, "name the series"),
        ({"x_train": X, "x_test": X[:, :, :4]}, "one shape"),
        ({"x_train": X, "x_test": X[:4], "y_train": Y}, "for all series or for none"),
        ({"x_train": X, "x_test": X[:4], "y_train": Y, "y_test": Y}, "one per series"),
        ({"signals": X, "labels": Y[:7]}, "one per series"),
        ({"signals": X, "labels": np.array(3)}, "one per series"),
        ({"signals": X, "labels": Y + 0.5}, "whole number or word"),
        ({"signals": X, "subjects": Y[:7]}, "one per series"),
        ({"signals": X.astype(str)}, "real numbers"),
        ({"signals": X.astype(complex)}, "real numbers"),
        ({"signals": np.array(1.0)}, "shape"),
        ({"signals": X[0, 0]}, "shape"),
        ({"signals": X[:0], "labels": Y[:0]}, "no series"),
        ({"signals": np.where(X > 2, np.nan, X)}, "not finite"),
        ({"signals": X.astype(np.float64) * 1e300}, "not finite"),
        ({"signals": np.array([None, 1], object)}, "without pickle"),
        ({"signals": X, "labels": Y.astype(object)}, "without pickle"),
        ({"signals": X, "is_test": np.zeros(20, bool)}, "both need some"),
    ],
)
def test_files_that_make_no_sense_are_refused(tmp_path: Path, arrays: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        SignalsNpz(write(tmp_path, **arrays)).load()


def test_files_that_are_not_npz_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.path="):
        SignalsNpz(str(tmp_path / "absent.npz")).load()
    whole = Path(write(tmp_path, signals=X)).read_bytes()
    np.save(tmp_path / "one.npy", X)
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.npz").write_bytes(b"no archive")
    (tmp_path / "empty.npz").write_bytes(b"")
    for name in ("one.npy", "cut.npz", "text.npz", "empty.npz"):
        with pytest.raises(ConfigError, match="cannot be read"):
            SignalsNpz(str(tmp_path / name)).load()


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (lambda: SignalsNpz("x", layout="rows"), "data.layout"),
        (lambda: SignalsNpz("x", test="official"), "data.test is"),
        (lambda: SignalsNpz("x", test_fraction=1.0), "test_fraction"),
        (lambda: UciHar("x", test="nobody"), "data.test is"),
        (lambda: SyntheticSignals(classes=1), "classes"),
        (lambda: SyntheticSignals(classes=9), "classes"),
        (lambda: SyntheticSignals(steps=4), "16"),
        (lambda: SyntheticSignals(noise=-1.0), "noise"),
    ],
)
def test_options_out_of_range_are_refused(source: Callable[[], Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        source()


# --- UCI HAR


def uci_har(folder: Path, steps: int = 8) -> Path:
    """Six subjects, two activities, three runs of 4 to 6 half-overlapping windows each; subject 6 is the test set."""
    root, draw = folder / "UCI HAR Dataset", rng()
    for part, subjects in (("train", (1, 2, 3, 4, 5)), ("test", (6,))):
        (root / part / "Inertial Signals").mkdir(parents=True)
        windows, labels, owner = [], [], []
        for subject in subjects:
            for label in (1, 2, 1, 2, 2, 1):
                count = int(draw.integers(4, 7))
                recording = draw.normal(size=(9, (count + 1) * steps // 2))
                windows += [recording[:, i * steps // 2 :][:, :steps] for i in range(count)]
                labels += [label] * count
                owner += [subject] * count
        for channel, name in enumerate(CHANNELS):
            values = [window[channel] for window in windows]
            np.savetxt(root / part / "Inertial Signals" / f"{name}_{part}.txt", values, "%16.7e")
        np.savetxt(root / part / f"y_{part}.txt", labels, "%d")
        np.savetxt(root / part / f"subject_{part}.txt", owner, "%d")
    (root / "activity_labels.txt").write_text("1 WALKING\n2 LAYING\n")
    return root


def test_uci_har_is_read_from_its_folder_and_from_the_one_above(tmp_path: Path) -> None:
    root = uci_har(tmp_path)
    data = UciHar(str(root), test="file").load()
    assert data.train.shape == (9, 8)
    assert data.classes == ("WALKING", "LAYING")
    assert (np.unique(data.train.groups).tolist(), np.unique(data.test.groups).tolist()) == ([1, 2, 3, 4, 5], [6])
    column = np.loadtxt(root / "train" / "Inertial Signals" / "body_gyro_y_train.txt")
    assert torch.equal(data.train.signals[:, 4], torch.from_numpy(column.astype(np.float32)))
    again = UciHar(str(tmp_path), test="auto").load()
    assert torch.equal(again.test.signals, data.test.signals)
    assert set(UciHar(str(tmp_path), test="groups").load().test.groups) & {1, 2, 3, 4, 5, 6}


def test_all_subjects_of_uci_har_can_be_clients_without_a_leak(tmp_path: Path) -> None:
    data = UciHar(str(uci_har(tmp_path))).load()
    assert not halves(data.train) & halves(data.test)
    for part in (data.train, data.test):
        assert np.unique(part.groups).tolist() == [1, 2, 3, 4, 5, 6]
        assert {(g, t) for g, t in zip(part.groups, part.targets, strict=True)} == {
            (g, t) for g in range(1, 7) for t in (0, 1)
        }
    assert 0.2 < len(data.test) / (len(data.train) + len(data.test)) < 0.45


def test_runs_begin_where_windows_do_not_overlap_or_the_subject_changes() -> None:
    line = np.arange(40.0)
    windows = np.stack([line[i : i + 8] for i in (0, 4, 8, 20, 24, 28)])[:, None]
    assert runs(windows, np.array([1, 1, 1, 1, 1, 2])).tolist() == [0, 0, 0, 1, 1, 2]


def test_damaged_folders_of_uci_har_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.root="):
        UciHar(str(tmp_path)).load()
    root = uci_har(tmp_path)
    table = root / "test" / "Inertial Signals" / "total_acc_z_test.txt"
    whole = table.read_text()
    for text, words in (("", "table of numbers"), ("1 2\n3 x\n", "table of numbers"), ("1 2\n3\n", "table of numbers")):
        table.write_text(text)
        with pytest.raises(ConfigError, match=words):
            UciHar(str(root)).load()
    table.write_text(whole.split("\n", 1)[1])
    with pytest.raises(ConfigError, match="shapes"):
        UciHar(str(root)).load()
    table.write_text(whole)
    (root / "activity_labels.txt").write_text("WALKING\n")
    with pytest.raises(ConfigError, match="activity_labels"):
        UciHar(str(root)).load()
    (root / "activity_labels.txt").unlink()
    table.unlink()
    with pytest.raises(ConfigError, match="There is no"):
        UciHar(str(root)).load()
    table.write_text(whole)
    (root / "test" / "y_test.txt").write_text("1\n2\n")
    with pytest.raises(ConfigError, match="shapes"):
        UciHar(str(root)).load()
    (root / "train" / "y_train.txt").unlink()
    with pytest.raises(ConfigError, match="There is no"):
        UciHar(str(root)).load()


# --- the UEA and UCR archives

HEADER = "#comment\n@problemName T\n@timeStamps false\n@missing false\n@univariate {}\n@classLabel {}\n@data\n"


def ts(folder: Path, train: str, test: str, univariate: str = "false", label: str = "true sit walk") -> str:
    for part, body in (("TRAIN", train), ("TEST", test)):
        (folder / f"T_{part}.ts").write_text(HEADER.format(univariate, label) + body)
    return str(folder)


def test_a_ts_file_of_many_channels(tmp_path: Path) -> None:
    path = ts(tmp_path, "1,2,3:4,5,6:walk\n7,8,9:1,1,1:sit\n\n", "0,0,0:-1.5,2e1,3:walk\n")
    for given in (path, str(tmp_path / "T_TRAIN.ts")):
        data = Ucr(given).load()
        assert data.train.signals.tolist() == [[[1, 2, 3], [4, 5, 6]], [[7, 8, 9], [1, 1, 1]]]
        assert data.test.signals.tolist() == [[[0, 0, 0], [-1.5, 20, 3]]]
        assert (data.train.targets.tolist(), data.classes) == ([1, 0], ("sit", "walk"))
        assert data.train.groups is None


def test_a_ts_file_of_one_channel_and_one_without_labels(tmp_path: Path) -> None:
    data = Ucr(ts(tmp_path, "1,2:10\n3,4:2\n", "5,6:10\n", "true", "true 10 2")).load()
    assert (data.train.shape, data.train.targets.tolist(), data.classes) == ((1, 2), [1, 0], ("2", "10"))
    bare = Ucr(ts(tmp_path, "1,2:3,4\n", "5,6:7,8\n", label="false")).load()
    assert (bare.train.shape, bare.train.targets) == ((2, 2), None)


def test_a_tsv_file_of_the_ucr_archive(tmp_path: Path) -> None:
    (tmp_path / "T_TRAIN.tsv").write_text("1\t0.5\t1.5\n-1\t2\t3\n")
    (tmp_path / "T_TEST.tsv").write_text("1\t5\t6\n")
    data = Ucr(str(tmp_path)).load()
    assert data.train.signals.tolist() == [[[0.5, 1.5]], [[2, 3]]]
    assert (data.train.targets.tolist(), data.classes) == ([1, 0], ("-1", "1"))


@pytest.mark.parametrize(
    ("train", "test", "words"),
    [
        ("1,2:walk\n3,4,5:sit\n", "1,2:walk\n", "one length"),
        ("1,2:walk\n", "1,2,3:walk\n", "one length"),
        ("1,2:3,4:walk\n", "1,2:walk\n", "one length"),
        ("1,2:3:walk\n", "1,2:3,4:walk\n", "Line 8 .* one length"),
        ("1,?:walk\n", "1,2:walk\n", "Line 8"),
        ("1,NaN:walk\n", "1,2:walk\n", "not finite"),
        ("(0,1),(1,2):walk\n", "1,2:walk\n", "Line 8"),
        ("", "1,2:walk\n", "both need some"),
    ],
)
def test_ts_files_that_cannot_be_used_are_refused(tmp_path: Path, train: str, test: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Ucr(ts(tmp_path, train, test)).load()


def test_archives_that_are_not_there_or_not_whole_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.path="):
        Ucr(str(tmp_path)).load()
    path = ts(tmp_path, "1,2:walk\n", "1,2:walk\n")
    (tmp_path / "T_TRAIN.ts").write_text("1,2:walk\n")
    with pytest.raises(ConfigError, match="@data"):
        Ucr(path).load()
    (tmp_path / "T_TRAIN.ts").write_text("@timeStamps true\n@classLabel true\n@data\n(0,1):walk\n")
    with pytest.raises(ConfigError, match="time stamp"):
        Ucr(path).load()
    (tmp_path / "T_TEST.ts").unlink()
    with pytest.raises(ConfigError, match="beside"):
        Ucr(path).load()
    (tmp_path / "U_TRAIN.ts").write_text("@data\n1,2:a\n")
    with pytest.raises(ConfigError, match=r"data\.path="):
        Ucr(path).load()


# --- drawn


@pytest.mark.parametrize(("steps", "channels", "classes"), [(96, 3, 6), (33, 1, 8)])
def test_synthetic_signals_come_from_their_seed(steps: int, channels: int, classes: int) -> None:
    def load(seed: int) -> Data:
        return SyntheticSignals(300, 100, classes, channels, steps, seed=seed).load()

    first, again, other = load(0), load(0), load(1)
    assert first.train.shape == (channels, steps)
    assert torch.equal(first.train.signals, again.train.signals)
    assert not torch.equal(first.train.signals, other.train.signals)
    assert np.bincount(first.train.targets, minlength=classes).min() >= 300 // classes
    assert len(np.unique(first.train.groups)) == 20
    assert len(first.classes) == classes


def test_waves_have_about_zero_mean_and_unit_variance() -> None:
    cycles = np.linspace(0, 8, 80_001)
    for name, wave in WAVES:
        values = wave(cycles)
        assert abs(values.mean()) < 0.02, name
        assert values.std() == pytest.approx(1.0, abs=0.03), name


def test_a_subject_has_its_own_levels_and_gains() -> None:
    data = SyntheticSignals(400, 10, noise=0.0, subjects=4).load().train
    level = data.signals.mean(2).numpy()
    within = np.mean([level[data.groups == s].var(0) for s in range(4)])
    between = np.var([level[data.groups == s].mean(0) for s in range(4)], 0).mean()
    assert between > 3 * within


# --- real files


def real_har() -> str:
    file = REAL / "har_smartphone.npz"
    if not file.is_file():
        pytest.skip("no har_smartphone.npz; set FEDSSL_DATA to the folder that holds it")
    return str(file)


def test_real_human_activity_makes_thirty_clients_without_a_leak() -> None:
    path = real_har()
    source: DataSource = config.compose(["data=har", f"data.path={path}"]).job.data
    data = source.load()
    train: Table = data.train
    assert train.shape == (9, 128)
    assert (len(data.train), len(data.test)) == (5293, 5118)
    assert not halves(data.train) & halves(data.test)
    for part in (data.train, data.test):
        assert len(np.unique(part.groups)) == 30
        assert np.bincount(part.targets, minlength=6).min() > 600
    assert min(len(rows) for rows in natural(data.train.groups, 30, rng())) > 130
    mean, std = data.train.constants()
    assert source.augment.mean == pytest.approx(mean, abs=1e-4)  # type: ignore[attr-defined]
    assert source.augment.std == pytest.approx(std, abs=1e-4)  # type: ignore[attr-defined]
    plain = source.augment.plain(data.train.signals)
    torch.testing.assert_close(plain.mean((0, 2)), torch.zeros(9), atol=1e-3, rtol=0)


def test_real_human_activity_with_its_official_division() -> None:
    data = SignalsNpz(real_har(), test="file").load()
    assert (len(data.train), len(data.test)) == (7415, 2996)
    assert np.unique(data.test.groups).tolist() == [2, 4, 9, 10, 12, 13, 18, 20, 24]
    assert data.classes[5] == "LAYING"
