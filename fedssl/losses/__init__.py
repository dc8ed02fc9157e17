"""Loss functions of self-supervised learning: tensors in, one value per example out, nothing changed on the way.

Low-precision inputs (float16, bfloat16) are computed in float32, and autocast is switched off inside: at temperature
0.01 a similarity rounded to bfloat16 would move a logit by 0.4. No function here waits for the device. A temperature
may be a 0-d tensor on the embeddings' device, for rules that adapt or learn it; its value is then not checked.

`vicreg`, `barlow_twins` and `decorrelation` are statistics of a batch and return () values.
"""

from __future__ import annotations

from fedssl.losses.contrastive import clip, info_nce, instance_discrimination, negative_weights, nt_xent
from fedssl.losses.distillation import dino, negative_cosine, negative_similarity
from fedssl.losses.pairwise import sigmoid_pair, spectral
from fedssl.losses.reconstruction import masked_reconstruction
from fedssl.losses.relational import jensen_shannon, kullback_leibler, relations
from fedssl.losses.statistics import VICRegTerms, barlow_twins, decorrelation, vicreg

__all__ = [
    "VICRegTerms",
    "barlow_twins",
    "clip",
    "decorrelation",
    "dino",
    "info_nce",
    "instance_discrimination",
    "jensen_shannon",
    "kullback_leibler",
    "masked_reconstruction",
    "negative_cosine",
    "negative_similarity",
    "negative_weights",
    "nt_xent",
    "relations",
    "sigmoid_pair",
    "spectral",
    "vicreg",
]
