"""Closed forms and exact small models of what self-supervised learning is said to do; numpy float64, no training.

One file a subject: `softmax` (InfoNCE as classification), `critic` (what it learns), `information` (its bound),
`factors` (augmentation), `geometry` (norms), `scores` and `temperatures` (how sharp the softmax should be), `simsiam`
(stop-gradient), `average` (EMA). Where a closed form contradicts what is often said, its docstring says so.
"""

from fedssl.theory.average import (
    ema_effective_count,
    ema_lag,
    ema_teacher,
    ema_weights,
    ema_weights_scheduled,
    ema_window,
)
from fedssl.theory.critic import critic_bias, expected_info_nce, optimal_critic, optimal_info_nce
from fedssl.theory.factors import TwoFactors, mutual_information, sample_two_factors, two_factor_information
from fedssl.theory.geometry import norm_after_step, norm_growth, radial_component
from fedssl.theory.information import (
    Estimate,
    asymptotic_bias,
    gaussian_correlation,
    gaussian_mutual_information,
    info_nce_bias,
    info_nce_bound,
    log_log_slope,
)
from fedssl.theory.scores import Moments, gradient_snr, negative_weights, positive_probability, probability_moments
from fedssl.theory.simsiam import (
    FixedPoint,
    LinearSimSiam,
    averaged_rate,
    linear_simsiam,
    simulate_linear_simsiam,
)
from fedssl.theory.softmax import cross_entropy, imprint_classifier, info_nce_logits, instance_classifier
from fedssl.theory.temperatures import for_target_probability, max_snr

__all__ = [
    "Estimate",
    "FixedPoint",
    "LinearSimSiam",
    "Moments",
    "TwoFactors",
    "asymptotic_bias",
    "averaged_rate",
    "critic_bias",
    "cross_entropy",
    "ema_effective_count",
    "ema_lag",
    "ema_teacher",
    "ema_weights",
    "ema_weights_scheduled",
    "ema_window",
    "expected_info_nce",
    "for_target_probability",
    "gaussian_correlation",
    "gaussian_mutual_information",
    "gradient_snr",
    "imprint_classifier",
    "info_nce_bias",
    "info_nce_bound",
    "info_nce_logits",
    "instance_classifier",
    "linear_simsiam",
    "log_log_slope",
    "max_snr",
    "mutual_information",
    "negative_weights",
    "norm_after_step",
    "norm_growth",
    "optimal_critic",
    "optimal_info_nce",
    "positive_probability",
    "probability_moments",
    "radial_component",
    "sample_two_factors",
    "simulate_linear_simsiam",
    "two_factor_information",
]
