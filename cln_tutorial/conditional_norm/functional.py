"""The norms as pure functions: checks of the arguments, above one family of operations."""

import torch
from jaxtyping import Float
from torch import Tensor

import cln_tutorial.conditional_norm.fused as fused


def conditional_layer_norm(
    x: Float[Tensor, "batch *positions dim"],
    gamma: Float[Tensor, "... dim"],
    beta: Float[Tensor, "... dim"] | None = None,
    eps: float = 1e-5,
    *,
    per_token: bool = False,
    backend: str = "auto",
) -> Float[Tensor, "batch *positions dim"]:
    r"""Normalise over the last dimension, then scale and shift as each example's condition says.

    .. math:: y_{bt} = (x_{bt} - \mu_{bt}) / \sqrt{\sigma_{bt}^2 + \epsilon}
        \odot \gamma_b + \beta_b \qquad (\sigma^2 \text{ biased, as in F.layer_norm})

    Args:
        x: ``(batch, *positions, dim)``, any floating dtype; batch and positions may be empty.
        gamma: scale: one vector per example ``(batch, dim)``, or one for all, ``(1, dim)`` or
            ``(dim,)``. Of two dimensions the first is always the batch, never the time.
        beta: shift, in one of the same forms; ``None`` means no shift. Both may be of another
            floating dtype than ``x``; they are converted to the dtype of the computation, below.
        eps: added to the variance.
        per_token: if true, ``gamma`` and ``beta`` have exactly the shape of ``x``.
        backend: one of :func:`available_backends`, or "auto" for the fastest on this input. All
            compute the same and are deterministic. Inside the transforms of ``torch.func`` and
            forward-mode AD every backend is the reference, which they can see into. A program
            exported with a backend that was asked for holds its forward pass only.

    Returns:
        Shape and dtype of ``x``. All is computed in float32 (float64 for float64) whatever the
        storage type; each gradient has the dtype of its input.

    Raises:
        TypeError: if a tensor is not of a floating dtype.
        ValueError: if shapes or devices do not fit, ``eps`` is negative, or ``backend`` is unknown,
            not installed or cannot take this input.

    Source: article 7124.

    Example:
        >>> x = torch.tensor([[[1.0, 3.0]], [[1.0, 3.0]]])
        >>> conditional_layer_norm(x, torch.tensor([[1.0, 1.0], [10.0, 10.0]]), eps=0.0).tolist()
        [[[-1.0, 1.0]], [[-10.0, 10.0]]]
    """
    _require(x, eps, per_token, gamma=gamma, beta=beta)
    return fused.norm(x, gamma, beta, fused.Kind(eps, rms=False, plus_one=False), backend)


def modulated_layer_norm(
    x: Float[Tensor, "batch *positions dim"],
    scale: Float[Tensor, "... dim"],
    shift: Float[Tensor, "... dim"] | None = None,
    eps: float = 1e-6,
    weight: Float[Tensor, "dim"] | None = None,
    bias: Float[Tensor, "dim"] | None = None,
    *,
    per_token: bool = False,
    backend: str = "auto",
) -> Float[Tensor, "batch *positions dim"]:
    r"""Layer norm whose result each example's condition scales around one, and shifts.

    .. math:: y_{bt} = (\hat x_{bt} \odot w + b) \odot (1 + s_b) + t_b

    The sum :math:`1 + s` is taken in float32 whatever the dtype of ``scale``: in bfloat16 it would
    be 1 for every :math:`-0.00195 \le s \le 0.0039`.

    Args:
        x: ``(batch, *positions, dim)``, any floating dtype.
        scale, shift: :math:`s` and :math:`t`, in the forms that :func:`conditional_layer_norm`
            takes as ``gamma`` and ``beta``.
        eps: added to the variance.
        weight, bias: :math:`w` and :math:`b` of the layer norm itself, ``(dim,)``; ``None`` for
            one and zero.
        per_token, backend: as in :func:`conditional_layer_norm`.

    Returns, raises: as :func:`conditional_layer_norm`.

    Source: Peebles & Xie 2022 (DiT, arXiv 2212.09748), adaLN.

    Example:
        >>> x = torch.tensor([[[1.0, 3.0]], [[1.0, 3.0]]])
        >>> modulated_layer_norm(x, torch.tensor([[0.0, 0.0], [9.0, 9.0]]), eps=0.0).tolist()
        [[[-1.0, 1.0]], [[-10.0, 10.0]]]
    """
    _require(x, eps, per_token, scale=scale, shift=shift)
    _require_for_all(x, weight=weight, bias=bias)
    return _modulated(x, scale, shift, eps, weight, bias, rms=False, backend=backend)


def conditional_rms_norm(
    x: Float[Tensor, "batch *positions dim"],
    gamma: Float[Tensor, "... dim"],
    beta: Float[Tensor, "... dim"] | None = None,
    eps: float = 1e-6,
    *,
    per_token: bool = False,
    backend: str = "auto",
) -> Float[Tensor, "batch *positions dim"]:
    r"""Divide by the root mean square, then scale and shift as each example's condition says.

    .. math:: y_{bt} = x_{bt} / \sqrt{\tfrac1D \textstyle\sum_d x_{btd}^2 + \epsilon}
        \odot \gamma_b + \beta_b

    Arguments, result and errors are those of :func:`conditional_layer_norm`.

    Source: Zhang & Sennrich 2019, Root Mean Square Layer Normalization (arXiv 1910.07467).

    Example:
        >>> x = torch.tensor([[[3.0, 4.0, 0.0, 0.0]]])
        >>> conditional_rms_norm(x, torch.ones(1, 4), eps=0.0).tolist()  # divided by 5 / 2
        [[[1.2000000476837158, 1.600000023841858, 0.0, 0.0]]]
    """
    _require(x, eps, per_token, gamma=gamma, beta=beta)
    return fused.norm(x, gamma, beta, fused.Kind(eps, rms=True, plus_one=False), backend)


def modulated_rms_norm(
    x: Float[Tensor, "batch *positions dim"],
    scale: Float[Tensor, "... dim"],
    shift: Float[Tensor, "... dim"] | None = None,
    eps: float = 1e-6,
    weight: Float[Tensor, "dim"] | None = None,
    *,
    per_token: bool = False,
    backend: str = "auto",
) -> Float[Tensor, "batch *positions dim"]:
    r"""RMS norm whose result each example's condition scales around one, and shifts.

    .. math:: y_{bt} = \hat x_{bt} \odot w \odot (1 + s_b) + t_b, \qquad
        \hat x = x / \sqrt{\tfrac1D \textstyle\sum_d x_d^2 + \epsilon}

    Arguments, result and errors are those of :func:`modulated_layer_norm`.

    Example:
        >>> x = torch.tensor([[[2.0, 2.0]]])
        >>> modulated_rms_norm(x, torch.tensor([[0.5, -1.0]]), eps=0.0).tolist()
        [[[1.5, 0.0]]]
    """
    _require(x, eps, per_token, scale=scale, shift=shift)
    _require_for_all(x, weight=weight)
    return _modulated(x, scale, shift, eps, weight, None, rms=True, backend=backend)


def gated_residual(
    x: Float[Tensor, "batch *positions dim"],
    h: Float[Tensor, "batch *positions dim"],
    gate: Float[Tensor, "... dim"],
    *,
    per_token: bool = False,
) -> Float[Tensor, "batch *positions dim"]:
    r"""Add a branch to the residual stream, scaled per example: :math:`x + g_b \odot h`.

    Args:
        x: residual stream, ``(batch, *positions, dim)``, any floating dtype.
        h: output of the branch, shape, dtype and device of ``x``.
        gate: one vector per example, or one for all, in the forms of ``gamma`` in
            :func:`conditional_layer_norm`. Zero means that the branch is not there yet.
        per_token: if true, ``gate`` has exactly the shape of ``x``.

    Returns:
        Shape and dtype of ``x``; product and sum are rounded once, from float32.

    Raises:
        TypeError, ValueError: if dtypes, shapes or devices do not fit.

    Source: Peebles & Xie 2022 (DiT, arXiv 2212.09748), adaLN-Zero.

    Example:
        >>> x, h = torch.ones(2, 3, 4), torch.ones(2, 3, 4)
        >>> gated_residual(x, h, gate=torch.zeros(2, 4)).equal(x)
        True
    """
    _require(x, 0.0, per_token, gate=gate)
    _require_branch(x, h)
    return fused.gated_residual(x, h, gate)


def gated_residual_modulated_layer_norm(
    x: Float[Tensor, "batch *positions dim"],
    h: Float[Tensor, "batch *positions dim"],
    gate: Float[Tensor, "... dim"],
    scale: Float[Tensor, "... dim"],
    shift: Float[Tensor, "... dim"] | None = None,
    eps: float = 1e-6,
    *,
    per_token: bool = False,
    backend: str = "auto",
) -> tuple[Float[Tensor, "batch *positions dim"], Float[Tensor, "batch *positions dim"]]:
    r"""The pair between two branches of a DiT block: gate one, normalise for the next.

    .. math:: x' = x + g_b \odot h, \qquad y = \hat x' \odot (1 + s_b) + t_b

    On a GPU one kernel reads ``x`` and ``h`` once and writes both results; elsewhere it is
    :func:`gated_residual` and :func:`modulated_layer_norm` in turn.

    Args:
        x, h, gate: as in :func:`gated_residual`.
        scale, shift, eps, per_token, backend: as in :func:`modulated_layer_norm`.

    Returns:
        ``(x', y)``, both of shape and dtype of ``x``. ``y`` is the norm of ``x'`` as stored.

    Raises:
        TypeError, ValueError: as in these two functions.

    Example:
        >>> x, h = torch.tensor([[[1.0, 3.0]]]), torch.tensor([[[1.0, 1.0]]])
        >>> one, zero = torch.ones(1, 2), torch.zeros(1, 2)
        >>> x_new, y = gated_residual_modulated_layer_norm(x, h, one, zero, zero, eps=0.0)
        >>> x_new.tolist(), y.tolist()
        ([[[2.0, 4.0]]], [[[-1.0, 1.0]]])
    """
    _require(x, eps, per_token, gate=gate, scale=scale, shift=shift)
    _require_branch(x, h)
    return fused.gated_norm(x, h, gate, scale, shift, fused.Kind(eps, False, True), backend)


def available_backends() -> tuple[str, ...]:
    """Names of the backends that this machine can run.

    "reference": plain operations of PyTorch, differentiable twice, on every device. "native":
    PyTorch's own layer norm on the CPU, once per example in the backward pass. "numba": one pass
    over the memory on the CPU, needs the extra ``fast``. "triton": fused kernels on a GPU.

    Example:
        >>> set(available_backends()) >= {"reference", "native"}
        True
    """
    names = (name for name in fused.BACKENDS if not fused.missing(name))
    return tuple(name for name in names if fused.imports(name))


def _modulated(
    x: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    eps: float,
    weight: Tensor | None,
    bias: Tensor | None,
    rms: bool,
    backend: str,
) -> Tensor:
    if weight is None and bias is None:
        return fused.norm(x, scale, shift, fused.Kind(eps, rms, plus_one=True), backend)
    # (x_hat w + b)(1 + s) + t = x_hat (1 + s) w + (1 + s) b + t: one more vector per example.
    wide = fused.wide_dtype(x)
    around_one = 1 + scale.to(wide)
    gamma = around_one if weight is None else around_one * weight.to(wide)
    beta = None if shift is None else shift.to(wide)
    if bias is not None:
        moved = around_one * bias.to(wide)
        beta = moved if beta is None else moved + beta
    return fused.norm(x, gamma, beta, fused.Kind(eps, rms, plus_one=False), backend)


def _require(x: Tensor, eps: float, per_token: bool, **conditions: Tensor | None) -> None:
    require_floats("x", x)
    shape = x.shape
    if len(shape) < 2:
        raise ValueError(f"`x` {tuple(shape)} must be (batch, *positions, dim); write `x[None]`.")
    if not eps >= 0:
        raise ValueError(f"`eps` must be zero or positive; got {eps}.")
    # Every call pays for these checks, 2 µs of the 10 that the smallest norm takes.
    usual, device = shape if per_token else (shape[0], shape[-1]), x.device
    for name, value in conditions.items():
        if value is not None:
            require_floats(name, value)
            if value.shape != usual:
                _require_form(name, value.shape, shape, per_token)
            if value.device != device:
                _refuse_device(name, value, x)


def _require_form(name: str, got: torch.Size, want: torch.Size, per_token: bool) -> None:
    if per_token:
        raise ValueError(
            f"`{name}` must have the shape of `x`, {tuple(want)}, with `per_token=True`; got "
            f"{tuple(got)}. Write `{name}.expand(x.shape)` if one vector stands for several "
            f"positions."
        )
    batch, dim = want[0], want[-1]
    if tuple(got) not in [(dim,), (1, dim), (batch, dim)]:
        raise ValueError(
            f"`{name}` must hold one vector per example, {(batch, dim)}, or one for all, "
            f"(1, {dim}) or ({dim},), for `x` of shape {tuple(want)}; got {tuple(got)}. A vector "
            f"per position is written `{name}.expand(x.shape)`, with `per_token=True`."
        )


def _require_for_all(x: Tensor, **vectors: Tensor | None) -> None:
    for name, value in vectors.items():
        if value is not None:
            require_floats(name, value)
            if value.device != x.device:
                _refuse_device(name, value, x)
            if value.shape != x.shape[-1:]:
                raise ValueError(
                    f"`{name}` must be one vector for all, ({x.shape[-1]},), for `x` of shape "
                    f"{tuple(x.shape)}; got {tuple(value.shape)}."
                )


def _require_branch(x: Tensor, h: Tensor) -> None:
    require_floats("h", h)
    if h.device != x.device:
        _refuse_device("h", h, x)
    if h.shape != x.shape:
        raise ValueError(f"`h` must have the shape of `x`, {tuple(x.shape)}; got {tuple(h.shape)}.")
    if h.dtype != x.dtype:
        raise TypeError(f"`h` must have the dtype of `x`, {x.dtype}; got {h.dtype}.")


def _refuse_device(name: str, value: Tensor, x: Tensor) -> None:
    raise ValueError(f"`{name}` is on {value.device}, `x` on {x.device}; write `.to(x.device)`.")


def require_floats(name: str, value: Tensor) -> None:
    """Raise a TypeError unless ``value`` is a tensor of a floating dtype."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"`{name}` must be a tensor of a floating dtype; got {got}.")


def require_indices(name: str, expectation: str, value: Tensor, size: int) -> None:
    if not isinstance(value, Tensor) or value.dtype not in (torch.int32, torch.int64):
        got = getattr(value, "dtype", type(value).__name__)
        raise TypeError(f"`{name}`: {expectation} expected, a tensor of int64 or int32; got {got}.")
    # What a compiler or a transform traces has no values to look at.
    traced = torch.compiler.is_compiling() or fused._functorch_active()
    if not traced and value.numel() and not 0 <= value.min() <= value.max() < size:
        raise ValueError(f"`{name}` must lie in 0..{size - 1}; got {value.min()}..{value.max()}.")
