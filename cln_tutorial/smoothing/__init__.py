r"""Differentiable stand-ins for max, argmax, sorting, top-k and the metrics that count.

.. math:: \max_i x_i \approx \tau \log \sum_i e^{x_i / \tau}, \qquad
    F_1 \approx \frac{2 \sum_i t_i p_i}{\sum_i (t_i + p_i)}

Source: Su Jianlin, article 6620 (https://kexue.fm/archives/6620), 2019, and its sequels 8718, 9098
and 10373; Martins & Astudillo 2016; Peters, Niculae & Martins 2019; Blondel, Teboul, Berthet &
Djolonga 2020.
"""

from cln_tutorial.smoothing.activations import (
    smooth_abs,
    smooth_clip,
    smooth_relu,
    smooth_round,
    smooth_sign,
    smooth_step,
)
from cln_tutorial.smoothing.isotonic import isotonic_regression
from cln_tutorial.smoothing.maxima import (
    smooth_max,
    smooth_min,
    soft_argmax,
    soft_onehot,
    straight_through,
)
from cln_tutorial.smoothing.metrics import (
    SoftConfusion,
    SoftFBetaLoss,
    soft_accuracy,
    soft_confusion,
    soft_f1_loss,
    soft_fbeta,
    soft_precision,
    soft_recall,
)
from cln_tutorial.smoothing.ranking import soft_auc_loss, soft_spearman
from cln_tutorial.smoothing.sorting import (
    SoftRank,
    SoftSort,
    soft_argsort,
    soft_kth,
    soft_median,
    soft_quantile,
    soft_rank,
    soft_sort,
)
from cln_tutorial.smoothing.sparse import (
    Entmax15,
    Sparsemax,
    entmax,
    entmax15,
    fenchel_young_loss,
    sparsemax,
)
from cln_tutorial.smoothing.threshold import best_fbeta_threshold
from cln_tutorial.smoothing.topk import soft_topk

__all__ = [
    "Entmax15",
    "SoftConfusion",
    "SoftFBetaLoss",
    "SoftRank",
    "SoftSort",
    "Sparsemax",
    "best_fbeta_threshold",
    "entmax",
    "entmax15",
    "fenchel_young_loss",
    "isotonic_regression",
    "smooth_abs",
    "smooth_clip",
    "smooth_max",
    "smooth_min",
    "smooth_relu",
    "smooth_round",
    "smooth_sign",
    "smooth_step",
    "soft_accuracy",
    "soft_argmax",
    "soft_argsort",
    "soft_auc_loss",
    "soft_confusion",
    "soft_f1_loss",
    "soft_fbeta",
    "soft_kth",
    "soft_median",
    "soft_onehot",
    "soft_precision",
    "soft_quantile",
    "soft_rank",
    "soft_recall",
    "soft_sort",
    "soft_spearman",
    "soft_topk",
    "sparsemax",
    "straight_through",
]
