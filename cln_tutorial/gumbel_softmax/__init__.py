r"""Reparameterisation, exact draws from logits, relaxed ones, and the gradients of both.

.. math:: \arg\max_i (o_i + G_i) \sim \mathrm{Cat}(\mathrm{softmax}(o)), \qquad
    \tilde y = \mathrm{softmax}\bigl((o + G) / \tau\bigr)

Source: Su Jianlin, article 6705 (https://kexue.fm/archives/6705), 2019; Jang, Gu & Poole 2017;
Maddison, Mnih & Teh 2017.
"""

from cln_tutorial.gumbel_softmax.discrete_vae import CategoricalVAE
from cln_tutorial.gumbel_softmax.estimators import (
    RLOO,
    ZGR,
    DisARM,
    Estimate,
    Exact,
    GumbelRao,
    GumbelSoftmax,
    Rebar,
    Reinforce,
    STGumbelSoftmax,
    StraightThrough,
)
from cln_tutorial.gumbel_softmax.measurement import Measurement, exact_gradient, measure
from cln_tutorial.gumbel_softmax.relaxation import ConcreteCategorical, gumbel_softmax
from cln_tutorial.gumbel_softmax.reparameterization import (
    GradientVariances,
    gaussian_variance_ratio,
    implicit_rsample,
    normal_rsample,
    score_function_surrogate,
)
from cln_tutorial.gumbel_softmax.sampling import (
    available_backends,
    conditional_gumbel,
    gumbel_max_sample,
    gumbel_noise,
    gumbel_top_k,
)

__all__ = [
    "RLOO",
    "ZGR",
    "CategoricalVAE",
    "ConcreteCategorical",
    "DisARM",
    "Estimate",
    "Exact",
    "GradientVariances",
    "GumbelRao",
    "GumbelSoftmax",
    "Measurement",
    "Rebar",
    "Reinforce",
    "STGumbelSoftmax",
    "StraightThrough",
    "available_backends",
    "conditional_gumbel",
    "exact_gradient",
    "gaussian_variance_ratio",
    "gumbel_max_sample",
    "gumbel_noise",
    "gumbel_softmax",
    "gumbel_top_k",
    "implicit_rsample",
    "measure",
    "normal_rsample",
    "score_function_surrogate",
]
