"""How one data set is divided among clients: pure functions of (targets or n, clients, rng), and the same as options.

Every function returns `clients` disjoint, sorted int64 index arrays, none of them empty, that hold every example.
"""

from fedssl.partition.base import Indices, Labels, Partition, Splittable
from fedssl.partition.classes import Pathological, pathological
from fedssl.partition.even import Iid, iid
from fedssl.partition.features import Appearance, FeatureShift, feature_shift
from fedssl.partition.groups import Natural, natural
from fedssl.partition.labels import Dirichlet, MixedSkew, dirichlet, mixed_skew
from fedssl.partition.measures import feature_skew, fingerprint, heterogeneity
from fedssl.partition.quantity import QuantitySkew, quantity_skew
from fedssl.partition.stored import SPLIT_FILE, Stored, read_split, write_split
from fedssl.partition.together import keep_together

__all__ = [
    "SPLIT_FILE",
    "Appearance",
    "Dirichlet",
    "FeatureShift",
    "Iid",
    "Indices",
    "Labels",
    "MixedSkew",
    "Natural",
    "Partition",
    "Pathological",
    "QuantitySkew",
    "Splittable",
    "Stored",
    "dirichlet",
    "feature_shift",
    "feature_skew",
    "fingerprint",
    "heterogeneity",
    "iid",
    "keep_together",
    "mixed_skew",
    "natural",
    "pathological",
    "quantity_skew",
    "read_split",
    "write_split",
]
