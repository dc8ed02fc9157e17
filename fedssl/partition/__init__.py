"""How one data set is divided among clients: pure functions of (targets or n, clients, rng), and the same as options.

Every function returns a sequence of `clients` disjoint, sorted int64 index arrays, none of them empty, that hold every
example; only those of `virtual` may overlap.
"""

from fedssl.partition.base import (
    Drawn,
    Elsewhere,
    Indices,
    Labels,
    Partition,
    Parts,
    Splittable,
    owner_of,
    parts_of,
    rows_of,
    sizes_of,
    some_of,
)
from fedssl.partition.classes import Pathological, pathological
from fedssl.partition.even import Iid, iid
from fedssl.partition.features import Appearance, FeatureShift, feature_shift
from fedssl.partition.groups import Natural, natural
from fedssl.partition.labels import Dirichlet, MixedSkew, dirichlet, mixed_skew
from fedssl.partition.measures import feature_skew, fingerprint, heterogeneity
from fedssl.partition.quantity import QuantitySkew, quantity_skew
from fedssl.partition.stored import SPLIT_FILE, Stored, read_split, write_split
from fedssl.partition.together import keep_together
from fedssl.partition.virtual import Virtual, virtual

__all__ = [
    "SPLIT_FILE",
    "Appearance",
    "Dirichlet",
    "Drawn",
    "Elsewhere",
    "FeatureShift",
    "Iid",
    "Indices",
    "Labels",
    "MixedSkew",
    "Natural",
    "Partition",
    "Parts",
    "Pathological",
    "QuantitySkew",
    "Splittable",
    "Stored",
    "Virtual",
    "dirichlet",
    "feature_shift",
    "feature_skew",
    "fingerprint",
    "heterogeneity",
    "iid",
    "keep_together",
    "mixed_skew",
    "natural",
    "owner_of",
    "parts_of",
    "pathological",
    "quantity_skew",
    "read_split",
    "rows_of",
    "sizes_of",
    "some_of",
    "virtual",
    "write_split",
]
