"""The TU collection of graph data sets: as its authors publish it, and packed in one .npz file."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedssl.datasets.base import Data
from fedssl.datasets.graphs.assemble import Choice, TuSet, assembled, names_of
from fedssl.datasets.graphs.table import Array
from fedssl.errors import ConfigError
from fedssl.modalities.graphs import GraphViews

VIEWS = GraphViews()
URL = "https://chrsmrrs.github.io/datasets/"


@dataclass(frozen=True)
class TuNpz:
    """One data set, or several, of a .npz file of TU data, read without pickle.

    Of each data set DS it reads `DS_node_offsets` (G + 1,), the nodes of graph g being offsets[g] to offsets[g + 1];
    `DS_edge_index` (2, E), node numbers over the whole data set, in any order; `DS_graph_labels` (G,) with
    `DS_graph_label_values`, their names; and, where there are, `DS_node_labels` (N,) or (N, K) and
    `DS_node_attributes` (N, A). Edge labels are not read.

    Args:
        path: the file.
        name: DS, or several joined by +, which then become the groups for the natural partition.
        features: of a node: "labels" (one-hot; the degree where a data set has none), "degrees" (one-hot), or "both".
            Several data sets share the columns of degrees only, since labels mean other things in each.
        degree_cap: degrees from this on are one feature.
        attributes: whether real-valued node attributes are appended; see data.augment.mean to normalise them.
        test_fraction: share of every class held out, always the same graphs.
        augment: how views are drawn.

    Raises:
        ConfigError: an unknown word, or a number out of range.

    References:
        Morris et al. 2020, arXiv:2007.08663 (TUDataset).
    """

    path: str
    name: str = "MUTAG"
    features: str = "labels"
    degree_cap: int = 32
    attributes: bool = False
    test_fraction: float = 0.2
    augment: GraphViews = VIEWS

    def __post_init__(self) -> None:
        names_of(self.name)
        self._choice()

    def load(self) -> Data:
        """Reads the file.

        Raises:
            ConfigError: no such file, not such a file, no such data set, or arrays that do not fit.
        """
        file = Path(self.path).expanduser()
        if not file.is_file():
            raise ConfigError(f"There is no file {self.path}; pass data.path=/path/to/a/file.npz.")
        try:
            with file.open("rb") as stream:
                archive = np.load(stream, allow_pickle=False)
                if isinstance(archive, np.ndarray):
                    raise ValueError("it is a .npy file")
                sets = [self._read(archive, name) for name in names_of(self.name)]
        except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise ConfigError(
                f"{self.path} cannot be read as a .npz file without pickle ({error}); write it with numpy.savez."
            ) from error
        return assembled(sets, self._choice())

    def _choice(self) -> Choice:
        return Choice(self.features, self.degree_cap, self.attributes, self.test_fraction)

    def _read(self, archive: Mapping[str, Array], name: str) -> TuSet:
        def column(kind: str) -> Array | None:
            return archive.get(f"{name}_{kind}")

        offsets, edges, labels = (column(kind) for kind in ("node_offsets", "edge_index", "graph_labels"))
        if offsets is None or edges is None:
            ending = "_edge_index"
            there = sorted(key.removesuffix(ending) for key in archive if key.endswith(ending))
            raise ConfigError(
                f"{self.path} has no arrays {name}_node_offsets and {name}_edge_index; "
                f"choose data.name from {', '.join(there) or 'another file, for this one holds no graphs'}."
            )
        values = column("graph_label_values")
        if labels is not None and values is not None and labels.size and labels.dtype.kind in "iu":
            if labels.min() < 0 or labels.max() >= len(values):
                raise ConfigError(
                    f"{name}_graph_labels in {self.path} go from {labels.min()} to {labels.max()} but "
                    f"{name}_graph_label_values names {len(values)} classes; number the labels from 0."
                )
            labels = values[labels]
        return checked(
            TuSet(
                name,
                offsets.astype(np.int64),
                edges.astype(np.int64),
                column("node_labels"),
                column("node_attributes"),
                labels,
            ),
            f"{name} in {self.path}",
        )


@dataclass(frozen=True)
class TuFolder:
    """One data set, or several, of the TU collection, unpacked: DS_A.txt, DS_graph_indicator.txt and so on.

    The files lie in `root` or in `root`/DS. `DS_A.txt` holds pairs of node numbers from 1 on; `DS_graph_indicator.txt`
    the graph of each node, from 1 on. `DS_graph_labels.txt`, `DS_node_labels.txt` and `DS_node_attributes.txt` may be
    missing; edge labels and attributes are not read.

    Args:
        root: the folder.
        name: DS, or several joined by +, which then become the groups for the natural partition.
        features, degree_cap, attributes, test_fraction, augment: see `TuNpz`.

    Raises:
        ConfigError: an unknown word, or a number out of range.

    References:
        Morris et al. 2020, arXiv:2007.08663 (TUDataset), https://chrsmrrs.github.io/datasets/.
    """

    root: str
    name: str
    features: str = "labels"
    degree_cap: int = 32
    attributes: bool = False
    test_fraction: float = 0.2
    augment: GraphViews = VIEWS

    def __post_init__(self) -> None:
        names_of(self.name)
        self._choice()

    def load(self) -> Data:
        """Reads the files.

        Raises:
            ConfigError: files that are missing, or do not fit each other.
        """
        return assembled([self._read(name) for name in names_of(self.name)], self._choice())

    def _choice(self) -> Choice:
        return Choice(self.features, self.degree_cap, self.attributes, self.test_fraction)

    def _read(self, name: str) -> TuSet:
        root = Path(self.root).expanduser()
        folder = next((place for place in (root, root / name) if (place / f"{name}_A.txt").is_file()), None)
        if folder is None:
            raise ConfigError(
                f"There is no {name}_A.txt in {self.root} or its folder {name}; unpack {name}.zip from {URL} there and "
                "pass data.root and data.name."
            )

        def table(kind: str, number: type = np.int64) -> Array | None:
            file = folder / f"{name}_{kind}.txt"
            return _numbers(file, number) if file.is_file() else None

        owner, edges = table("graph_indicator"), table("A")
        if owner is None or edges is None or owner.size == 0:
            raise ConfigError(
                f"{folder} has no {name}_graph_indicator.txt with the graph of each node; unpack it anew."
            )
        if edges.size == 0:
            edges = edges.reshape(0, 2)
        order = np.argsort(
            owner[:, 0], kind="stable"
        )  # nodes are stored graph after graph, which the format does not ask
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        if edges.shape[1] != 2 or (edges.size and (edges.min() < 1 or edges.max() > len(order))):
            raise ConfigError(
                f"{name}_A.txt holds something else than pairs of numbers from 1 to {len(order)}, the number of lines "
                f"of {name}_graph_indicator.txt; unpack it anew."
            )
        labels, attributes, targets = table("node_labels"), table("node_attributes", np.float64), table("graph_labels")
        for kind, column in (("node_labels", labels), ("node_attributes", attributes)):
            if column is not None and len(column) != len(order):
                raise ConfigError(f"{name}_{kind}.txt has {len(column)} lines for {len(order)} nodes; unpack it anew.")
        return checked(
            TuSet(
                name,
                np.cumsum(np.bincount(owner[:, 0].clip(min=0))),  # graphs are numbered from 1: none has number 0
                place[edges - 1].T,
                None if labels is None else labels[order],
                None if attributes is None else attributes[order],
                None if targets is None else targets[:, 0],
            ),
            f"{name} in {folder}",
        )


def checked(part: TuSet, where: str) -> TuSet:
    """The same data set, whose columns fit its nodes and graphs.

    Raises:
        ConfigError: they do not; `where` names the data set.
    """
    offsets = part.node_offsets
    if offsets.ndim != 1 or len(offsets) < 2 or offsets[0] != 0 or np.any(np.diff(offsets) < 0):
        raise ConfigError(
            f"The graphs of {where} have no ascending numbers of nodes from 0 on; number graphs from 1 in a folder, "
            "or give (G + 1,) offsets in a file."
        )
    for kind, column, n, dims in (
        ("graph labels", part.targets, len(offsets) - 1, (1,)),
        ("node labels", part.node_labels, part.nodes, (1, 2)),
        ("node attributes", part.attributes, part.nodes, (2,)),
    ):
        if column is not None and (column.ndim not in dims or len(column) != n):
            unit = "graphs" if n == len(offsets) - 1 else "nodes"
            raise ConfigError(f"The {kind} of {where} have shape {column.shape} for {n} {unit}; give one per row.")
    for kind, column in (("graph labels", part.targets), ("node labels", part.node_labels)):
        if column is not None and column.dtype.kind not in "iub":
            raise ConfigError(f"The {kind} of {where} are {column.dtype}; one class each needs whole numbers.")
    labels = part.node_labels
    if labels is None or labels.ndim == 2:
        return part
    return TuSet(part.name, offsets, part.edges, labels[:, None], part.attributes, part.targets)


def _numbers(file: Path, number: type) -> Array:
    """(rows, columns) from a text of numbers separated by commas or spaces."""
    try:
        text = file.read_text(encoding="ascii").replace(",", " ")
        lines = [line for line in text.splitlines() if line.strip()]
        if not lines:
            return np.empty((0, 1), number)
        out: Array = np.loadtxt(lines, dtype=number, ndmin=2)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} is no table of numbers ({error}); unpack it anew.") from error
    return out
