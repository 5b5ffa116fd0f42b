r"""Conditional layer normalisation: one network, one condition per example.

.. math:: y_{bt} = \hat x_{bt} \odot \gamma_b + \beta_b, \qquad
    \hat x = \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}}, \qquad
    \gamma_b = \gamma + W_\gamma c_b, \quad \beta_b = \beta + W_\beta c_b

Source: Su Jianlin, article 7124 (https://kexue.fm/archives/7124), 2019; for speech before that
Kim, Song & Bengio 2017, Dynamic Layer Normalization (arXiv 1707.06065).
"""

from cln_tutorial.conditional_norm.adapter import load_adapter, save_adapter
from cln_tutorial.conditional_norm.conversion import (
    conditional_parameters,
    convert_layer_norms,
    fold,
    fold_into_linear,
    freeze_base,
)
from cln_tutorial.conditional_norm.functional import (
    available_backends,
    conditional_layer_norm,
    conditional_rms_norm,
    gated_residual,
    gated_residual_modulated_layer_norm,
    modulated_layer_norm,
    modulated_rms_norm,
)
from cln_tutorial.conditional_norm.generation import (
    SwapGap,
    generative_classifier,
    sample,
    swap_label_gap,
    truncate_logits,
)
from cln_tutorial.conditional_norm.grammar import Grammar, made_reviews
from cln_tutorial.conditional_norm.language_model import ConditionalLanguageModel, KeyValueCache
from cln_tutorial.conditional_norm.modules import (
    AdaLNZero,
    ConditionalLayerNorm,
    ConditionalNorm,
    ConditionalRMSNorm,
    condition,
)
from cln_tutorial.conditional_norm.scenes import (
    SCENES,
    ImageEncoder,
    Scene,
    Shape,
    digit_captions,
    handwritten_digits,
    render_scenes,
    scene_captions,
)

__all__ = [
    "SCENES",
    "AdaLNZero",
    "ConditionalLanguageModel",
    "ConditionalLayerNorm",
    "ConditionalNorm",
    "ConditionalRMSNorm",
    "Grammar",
    "ImageEncoder",
    "KeyValueCache",
    "Scene",
    "Shape",
    "SwapGap",
    "available_backends",
    "condition",
    "conditional_layer_norm",
    "conditional_parameters",
    "conditional_rms_norm",
    "convert_layer_norms",
    "digit_captions",
    "fold",
    "fold_into_linear",
    "freeze_base",
    "gated_residual",
    "gated_residual_modulated_layer_norm",
    "generative_classifier",
    "handwritten_digits",
    "load_adapter",
    "made_reviews",
    "modulated_layer_norm",
    "modulated_rms_norm",
    "render_scenes",
    "sample",
    "save_adapter",
    "scene_captions",
    "swap_label_gap",
    "truncate_logits",
]
