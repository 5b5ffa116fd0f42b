"""The threshold with the best F-beta: what a soft F-beta has to beat.

Source: Lipton, Elkan & Naryanaswamy 2014 (arXiv 1402.1892).
"""

import math

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from cln_tutorial._transforms import values_are_hidden
from cln_tutorial.smoothing._checks import require_floating, wide_dtype


@torch.no_grad()
def best_fbeta_threshold(
    scores: Shaped[Tensor, "..."],
    target: Shaped[Tensor, "..."],
    beta: float | int = 1.0,
    *,
    sample_weight: Shaped[Tensor, "..."] | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    r"""Find the threshold whose predictions ``scores >= threshold`` have the largest F-beta.

    .. math:: \theta^* = \arg\max_\theta
        \frac{(1+\beta^2) \sum_{s_i \ge \theta} w_i t_i}
        {\beta^2 \sum_i w_i t_i + \sum_{s_i \ge \theta} w_i}

    Exact: one sort and two running sums look at every threshold that tells scores apart. Equal
    scores are taken together or not at all. For the probabilities of a calibrated model
    :math:`\theta^* \to F^* / 2`.

    Args:
        scores: any shape, any monotone scale: logits or probabilities.
        target: same shape, 0 and 1.
        beta: weight of recall against precision, at least 0 and finite.
        sample_weight: same shape, at least 0.

    Returns:
        ``(threshold, value)``. The threshold is one of the scores, in their dtype, the largest of
        those that are best; the value is of float32 at least. Without positives every F-beta is 0:
        the threshold is infinity, which predicts none. A NaN among the scores makes both NaN.

    Raises:
        TypeError: if ``scores`` are not floating.
        ValueError: for shapes that differ, a ``beta`` that is negative or not finite, and, on a
            CPU, for targets that are not 0 or 1 and weights that are negative or not finite.

    Source:
        Lipton, Elkan & Naryanaswamy 2014; as scikit-learn's ``precision_recall_curve``.

    Example:
        >>> scores, target = torch.tensor([0.9, 0.7, 0.7, 0.2]), torch.tensor([1, 1, 0, 0])
        >>> best_fbeta_threshold(scores, target)
        (tensor(0.7000), tensor(0.8000))
    """
    require_floating("scores", scores)
    if not 0 <= beta < math.inf:
        raise ValueError(f"`beta` must be finite and at least 0; got {beta}.")
    for name, other in (("target", target), ("sample_weight", sample_weight)):
        if other is not None and other.shape != scores.shape:
            raise ValueError(
                f"`{name}` must have the shape of `scores` {tuple(scores.shape)}; "
                f"got {tuple(other.shape)}."
            )
    if scores.device.type == "cpu" and not values_are_hidden():
        if not ((target == 0) | (target == 1)).all():
            raise ValueError("`target` must be 0 or 1.")
        if (
            sample_weight is not None
            and not ((sample_weight >= 0) & (sample_weight < math.inf)).all()
        ):
            raise ValueError("`sample_weight` must be finite and at least 0.")
    value_dtype = wide_dtype(scores.dtype)
    if scores.numel() == 0:
        return scores.new_tensor(math.inf), scores.new_tensor(0.0, dtype=value_dtype)
    # Counts are whole in float64 up to 2^53, in float32 (all that Apple's GPU has) up to 2^24.
    exact = torch.float32 if scores.device.type == "mps" else torch.float64
    ordered, order = scores.flatten().sort(descending=True)
    weight = torch.ones_like(ordered, dtype=exact)
    if sample_weight is not None:
        weight = sample_weight.flatten()[order].to(exact)
    hits = (weight * target.flatten()[order].to(exact)).cumsum(0)
    fbeta = (1 + beta**2) * hits / (beta**2 * hits[-1] + weight.cumsum(0))
    # 0 / 0, where nothing so far has weight; and inside of a tie there is no threshold.
    fbeta = torch.where(hits > 0, fbeta, 0)
    inside = torch.zeros_like(ordered, dtype=torch.bool)
    inside[:-1] = ordered[:-1] == ordered[1:]
    best = torch.where(inside, -1, fbeta).argmax(0, keepdim=True)
    value = fbeta.gather(0, best).squeeze(0)
    threshold = ordered.gather(0, best).squeeze(0)
    threshold = torch.where(value > 0, threshold, math.inf)
    poisoned = scores.isnan().any()
    return (
        torch.where(poisoned, math.nan, threshold).to(scores.dtype),
        torch.where(poisoned, math.nan, value).to(value_dtype),
    )
