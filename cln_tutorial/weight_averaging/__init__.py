r"""Averages of the weights: the EMA that moves when it should, and all its relatives.

.. math:: \Theta \leftarrow \Theta + (1 - \beta)(\theta - \Theta)

Source: Su Jianlin, article 6575 (https://kexue.fm/archives/6575), 2019, section 2; Ruppert 1988;
Polyak & Juditsky 1992; Karras et al. 2024 (arXiv 2312.02696).
"""

from cln_tutorial.weight_averaging.averages import (
    ExponentialMovingAverage,
    StochasticWeightAveraging,
)
from cln_tutorial.weight_averaging.batchnorm import recompute_batchnorm_
from cln_tutorial.weight_averaging.functional import available_backends, ema_update_
from cln_tutorial.weight_averaging.post_hoc import (
    PowerFunctionAverage,
    Reconstruction,
    profile_dot,
    profile_error,
    reconstruct,
    solve_coefficients,
)
from cln_tutorial.weight_averaging.profiles import (
    ConstantDecay,
    HalfLife,
    InverseGammaWarmup,
    PowerFunction,
    Profile,
    TensorFlowWarmup,
    Uniform,
    gamma_to_sigma_rel,
    sigma_rel_to_gamma,
)

__all__ = [
    "ConstantDecay",
    "ExponentialMovingAverage",
    "HalfLife",
    "InverseGammaWarmup",
    "PowerFunction",
    "PowerFunctionAverage",
    "Profile",
    "Reconstruction",
    "StochasticWeightAveraging",
    "TensorFlowWarmup",
    "Uniform",
    "available_backends",
    "ema_update_",
    "gamma_to_sigma_rel",
    "profile_dot",
    "profile_error",
    "recompute_batchnorm_",
    "reconstruct",
    "sigma_rel_to_gamma",
    "solve_coefficients",
]
