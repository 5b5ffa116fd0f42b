r"""The hinge of JoSE, and the three rules by which a step is made of it.

A centre word :math:`u` shall agree with its contexts more than a noise word :math:`u'` does, by a
margin :math:`m`. The paper has one joint hinge with two contexts, the neighbour :math:`v` and the
document :math:`d`; its program has two hinges with one context each. With :math:`s` the sum of the
contexts, :math:`f = s^\top u` and :math:`h = s^\top u'`, all of them are :math:`[m - f + h]_+`.

Here all is plain PyTorch, in float64 if asked; the loops of ``numba_loops`` are tested against it.

Source: article 7063; Meng et al. 2019 (arXiv 1911.01196), and the program that they released.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from cln_tutorial.spherical_embedding.geometry import retract

OBJECTIVES = ("two_hinge", "joint")
FACTORS = ("program", "paper", "none")


def jose_loss(
    u: Float[Tensor, "*batch dim"],
    v: Float[Tensor, "*batch dim"],
    d: Float[Tensor, "*batch dim"],
    u_neg: Float[Tensor, "*batch negatives dim"],
    margin: float | int = 0.15,
    *,
    objective: str = "joint",
    d_neg: Float[Tensor, "*batch negatives dim"] | None = None,
    reduction: str = "mean",
) -> Float[Tensor, "..."]:
    r"""Compute the hinge of words and documents on the sphere.

    .. math::
        \text{joint: } [m - v^\top u - d^\top u + v^\top u' + d^\top u']_+ \qquad
        \text{two\_hinge: } [m - v^\top u + v^\top u']_+ + [m - d^\top u + d^\top u'']_+

    Args:
        u: centre words, ``(*batch, dim)``, any floating dtype; unit vectors, which is not checked.
        v: their context words, of the second table.
        d: their documents.
        u_neg: noise words :math:`u'`, ``(*batch, negatives, dim)``.
        margin: :math:`m`.
        objective: "joint", the paper's, or "two_hinge", the program's, in which each hinge has the
            whole margin and noise words of its own.
        d_neg: the noise words :math:`u''` of the documents' hinge, ``u_neg`` if there are none.
        reduction: "mean", "sum" or "none", over all hinges of the batch and all noise words.

    Returns:
        A scalar, or ``(*batch, negatives)`` for "none".

    Raises:
        ValueError: for another objective or reduction, shapes that do not fit, or ``d_neg`` with
            the joint hinge, which has no place for it.

    Source:
        Article 7063, equations 1 and 2; the two hinges are those of the released program.

    Example:
        >>> u, v, d = torch.eye(3)
        >>> jose_loss(u, v, d, u_neg=-u[None])  # all dots are zero
        tensor(0.1500)
        >>> jose_loss(u, v, d, u_neg=-u[None], objective="two_hinge")
        tensor(0.3000)
    """
    _require_one_of("objective", objective, OBJECTIVES)
    _require_one_of("reduction", reduction, ("mean", "sum", "none"))
    if objective == "joint" and d_neg is not None:
        raise ValueError(
            "`d_neg` belongs to objective='two_hinge'; the joint hinge has one noise word for both."
        )
    d_neg = u_neg if d_neg is None else d_neg
    for name, value, wanted in (
        ("v", v, u.shape),
        ("d", d, u.shape),
        ("u_neg", u_neg, (*u.shape[:-1], *u_neg.shape[-2:-1], u.shape[-1])),
        ("d_neg", d_neg, u_neg.shape),
    ):
        if value.shape != wanted:
            raise ValueError(f"`{name}` must have shape {tuple(wanted)}; got {tuple(value.shape)}.")
    word_gap = _dot(v, u)[..., None] - _dot(v[..., None, :], u_neg)
    document_gap = _dot(d, u)[..., None] - _dot(d[..., None, :], d_neg)
    if objective == "joint":
        hinge = (margin - word_gap - document_gap).relu()
    else:
        hinge = (margin - word_gap).relu() + (margin - document_gap).relu()
    return hinge if reduction == "none" else getattr(hinge, reduction)()


def jose_step(
    u: Float[Tensor, "*batch dim"],
    contexts: Float[Tensor, "*batch contexts dim"],
    u_neg: Float[Tensor, "*batch dim"],
    *,
    margin: float | int = 0.15,
    factor: str = "program",
) -> tuple[
    Float[Tensor, "*batch dim"], Float[Tensor, "*batch contexts dim"], Float[Tensor, "*batch dim"]
]:
    r"""Return where each vector of a triple goes at learning rate 1: along its sphere, downhill.

    Where the hinge is open, :math:`f - h < m`, each vector follows its negative gradient on the
    sphere, times a factor:

    ==========  ============================  =============================  ===============
    vector      direction                     "paper"                        "program"
    ==========  ============================  =============================  ===============
    :math:`u`   :math:`s - f u`               :math:`1 - f/\|s\|`            :math:`1-f`
    :math:`u'`  :math:`-(s - h u')`           :math:`1 + h/\|s\|`            :math:`2h`
    :math:`v`   :math:`u - u' - (f_v-h_v) v`  :math:`1-(f_v-h_v)/\|u-u'\|`   :math:`1-(f-h)`
    ==========  ============================  =============================  ===============

    The paper's is :math:`1 - \cos(-\nabla, x)` throughout, and "none" is 1. Where it is closed,
    :math:`f - h = m` included, nothing moves.

    Args:
        u: centre words, ``(*batch, dim)``; float32 or float64.
        contexts: ``(*batch, 1, dim)`` for a word or a document, ``(*batch, 2, dim)`` for both in
            one hinge.
        u_neg: one noise word per triple.
        margin: :math:`m`.
        factor: "program", "paper" or "none". The program has no joint hinge.

    Returns:
        The steps of ``u``, ``contexts`` and ``u_neg``, tangent to them if they are unit vectors.

    Raises:
        ValueError: for another factor, or "program" with two contexts.

    Source:
        The paper's equation of the factor; the released program for the other.

    Example:
        >>> u, v, noise = torch.eye(3)
        >>> of_u, of_contexts, of_noise = jose_step(u, v[None], noise, factor="none")
        >>> of_u, of_contexts
        (tensor([0., 1., 0.]), tensor([[ 1.,  0., -1.]]))
    """
    require_rule("joint" if contexts.shape[-2] > 1 else "two_hinge", factor)
    total, apart = contexts.sum(-2), u - u_neg
    f, h = _dot(total, u)[..., None], _dot(total, u_neg)[..., None]
    gap = _dot(contexts, apart[..., None, :])[..., None]
    if factor == "paper":
        length, distance = _length(total), _length(apart)[..., None, :]
        of_u, of_noise, of_context = 1 - f / length, 1 + h / length, 1 - gap / distance
    elif factor == "program":
        of_u, of_noise, of_context = 1 - f, 2 * h, 1 - gap
    else:
        of_u, of_noise, of_context = torch.ones_like(f), torch.ones_like(f), torch.ones_like(gap)
    is_open = f - h < margin
    return (
        is_open * of_u * (total - f * u),
        is_open[..., None, :] * of_context * (apart[..., None, :] - gap * contexts),
        is_open * of_noise * -(total - h * u_neg),
    )


def update_(
    vectors: Float[Tensor, "rows dim"],
    triples: Int64[Tensor, "triples columns"],
    lr: float | int | Float[Tensor, "triples"],
    *,
    margin: float | int = 0.15,
    factor: str = "program",
) -> Float[Tensor, "triples"]:
    r"""Move the rows of some triples, in place: read all, sum what each row gets, retract once.

    .. math:: x \leftarrow \frac{x + \sum \eta z}{\|x + \sum \eta z\|}

    With one triple this is the sequential rule. A noise word that is the centre word itself, which
    the program allows, gets the sum of both its steps.

    Args:
        vectors: the table of all vectors, of any floating dtype; half types are computed in
            float32.
        triples: numbers of rows: the centre word, one context (or two, for the joint hinge), the
            noise word.
        lr: :math:`\eta`, one for all or one per triple.
        margin, factor: as in :func:`jose_step`.

    Returns:
        The hinge of each triple before the step, zero where nothing moved.

    Raises:
        ValueError: as :func:`jose_step`.

    Example:
        >>> vectors = torch.eye(3)
        >>> update_(vectors, torch.tensor([[0, 1, 2]]), lr=1.0, factor="none")
        tensor([0.1500])
        >>> vectors[0]
        tensor([0.7071, 0.7071, 0.0000])
    """
    rows = vectors[triples]
    rows = rows.float() if rows.itemsize == 2 else rows
    u, contexts, u_neg = rows[:, 0], rows[:, 1:-1], rows[:, -1]
    hinge = (margin - _dot(contexts.sum(-2), u - u_neg)).relu()
    steps = jose_step(u, contexts, u_neg, margin=margin, factor=factor)
    steps = torch.cat([steps[0][:, None], steps[1], steps[2][:, None]], 1)
    steps = steps * (lr[:, None, None] if isinstance(lr, Tensor) else lr)
    is_open = hinge > 0
    touched, place = triples[is_open].unique(return_inverse=True)
    total = steps.new_zeros(len(touched), vectors.shape[1])
    # Not `index_add_`, which adds in another order each time on a GPU.
    total.index_put_((place,), steps[is_open], accumulate=True)
    vectors[touched] = retract(vectors[touched].to(total.dtype), total).to(vectors.dtype)
    return hinge


def require_rule(objective: str, factor: str) -> None:
    """Refuse unknown names, and the factor of a program that has no joint hinge."""
    _require_one_of("objective", objective, OBJECTIVES)
    _require_one_of("factor", factor, FACTORS)
    if objective == "joint" and factor == "program":
        raise ValueError(
            "factor='program' belongs to objective='two_hinge': the program has no joint hinge. "
            "Use factor='paper' or 'none' with objective='joint'."
        )


def _require_one_of(name: str, value: str, names: tuple[str, ...]) -> None:
    if value not in names:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, names))}; got {value!r}.")


def _dot(x: Float[Tensor, "..."], y: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    return (x * y).sum(-1)


def _length(x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch 1"]:
    """Norms that one may divide by: the direction of a zero vector is then zero."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
