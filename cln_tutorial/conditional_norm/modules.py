"""Norms with a condition, and the block that gives it to a whole model."""

import contextlib
import copy
import functools
import numbers
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cln_tutorial.conditional_norm.functional import (
    conditional_layer_norm,
    conditional_rms_norm,
    require_floats,
)
from cln_tutorial.conditional_norm.fused import wide_dtype


class ConditionalNorm:
    """What all conditional norms do, beside the class of the plain norm that they come from."""

    plain: ClassVar[type[nn.Module]]
    compute: ClassVar[Callable[..., Tensor]]

    # True once a `condition` block has acted on the norm. A call inside a backward pass without a
    # block is from then on taken for a recomputation that has lost its condition.
    _ever_conditioned = False

    def forward(
        self, x: Float[Tensor, "*positions dim"], cond: Float[Tensor, "rows width"] | None = None
    ) -> Float[Tensor, "*positions dim"]:
        """Normalise ``x`` of shape ``(batch, *positions, dim)`` under ``cond``.

        ``cond`` is ``(batch, cond_dim)`` or ``(1, cond_dim)``. ``None`` takes the condition of the
        enclosing :func:`condition` block; without one the plain norm acts.

        Raises:
            TypeError, ValueError: if dtype, batch or width of ``cond`` do not fit.
            RuntimeError: if a backward pass runs the norm again after its block has ended.
        """
        expand_beams = False
        if cond is None:
            cond, expand_beams = self._condition_of_the_block()
        if cond is None:
            return super().forward(x)
        gamma, beta = self.gamma_beta(cond)
        if len(cond) not in (1, len(x)):
            beams = _beams(x, cond, expand_beams)
            gamma = gamma.repeat_interleave(beams, dim=0)
            beta = None if beta is None else beta.repeat_interleave(beams, dim=0)
        y = self.compute(x, gamma, beta, epsilon(self, x))
        if x.dtype != self.weight.dtype and self.plain not in (nn.LayerNorm, nn.RMSNorm):
            # Such a norm may hand on another dtype than it gets, as T5's does in a half model.
            return y.to(super().forward(x[:0]).dtype)
        return y

    def gamma_beta(
        self, cond: Float[Tensor, "rows width"]
    ) -> tuple[Float[Tensor, "rows dim"], Float[Tensor, "rows dim"] | None]:
        """Return the scale and the shift (``None`` in a norm without bias) under ``cond``."""
        first = _layers(self)[0]
        _require_cond(cond, first)
        # In bfloat16 1 + s is 1 for |s| < 0.0019: the sum is float32, or float64 for float64.
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        moved = self.cond_proj(cond.to(first.weight.dtype)).to(wide)
        if bias_of(self) is None:
            return self.weight.to(wide) + moved, None
        scale, shift = moved.chunk(2, dim=-1)
        return self.weight.to(wide) + scale, self.bias.to(wide) + shift

    def fold(self, cond: Float[Tensor, "... width"]) -> nn.Module:
        """Return the plain norm that this one is under one condition; errors as :func:`fold`."""
        norm = copy.deepcopy(self)
        norm.become_plain(one_condition(cond))
        return norm

    def reset_parameters(self) -> None:
        """Start anew: base scale 1 and shift 0, W zero, or random without ``zero_init``.

        A hidden layer is drawn anew too, for all norms that share it.
        """
        nn.init.ones_(self.weight)
        if bias_of(self) is not None:
            nn.init.zeros_(self.bias)
        if hasattr(self, "cond_proj"):  # not yet when the plain class makes its own parameters
            for layer in _layers(self):
                layer.reset_parameters()
            self._start_the_projection()

    def attach(
        self,
        cond_dim: int,
        hidden_dim: int | None,
        act: str,
        zero_init: bool,
        hidden: nn.Linear | None = None,
    ) -> None:
        """Make ``cond_proj``; ``hidden`` is the hidden layer of other norms, to be shared."""
        activations = {"silu": nn.SiLU, "gelu": nn.GELU, "relu": nn.ReLU, "tanh": nn.Tanh}
        if act not in activations:
            raise ValueError(f"`hidden_act` must be one of {[*activations]}; got {act!r}.")
        outputs = self.weight.numel() * (1 if bias_of(self) is None else 2)
        linear = partial(nn.Linear, bias=False, device=self.weight.device, dtype=self.weight.dtype)
        self.cond_proj = last = linear(hidden_dim or cond_dim, outputs)
        if hidden_dim is not None:
            hidden = hidden or linear(cond_dim, hidden_dim)
            self.cond_proj = nn.Sequential(hidden, activations[act](), last)
        self.zero_init = zero_init
        self._start_the_projection()
        self.cond_proj.train(self.training)

    @torch.no_grad()
    def become_plain(self, cond: Tensor) -> None:
        gamma, beta = self.gamma_beta(cond)
        # New parameters: the old ones may be shared with a norm that has another projection.
        for old, name, value in ((self.weight, "weight", gamma), (bias_of(self), "bias", beta)):
            if value is not None:
                setattr(self, name, nn.Parameter(value[0].to(old.dtype), old.requires_grad))
        del self.cond_proj, self.zero_init
        self.__class__ = self.plain

    def _start_the_projection(self) -> None:
        if self.zero_init:
            nn.init.zeros_(_layers(self)[-1].weight)

    def _condition_of_the_block(self) -> tuple[Tensor | None, bool]:
        block = self._innermost(_this_thread.blocks)
        # A compiler, which recomputes in its own way, cannot look into the number of the task.
        compiling = torch.compiler.is_compiling()
        if block is None and self._ever_conditioned and not compiling:
            if torch._C._current_graph_task_id() == -1:
                return None, False
            block = self._block_of_the_backward_pass()
        if block is None:
            return None, False
        block.used = self._ever_conditioned = True
        return block.cond, block.expand_beams

    def _innermost(self, blocks: list["_Block"]) -> "_Block | None":
        return next((block for block in reversed(blocks) if id(self) in block.norms), None)

    def _block_of_the_backward_pass(self) -> "_Block":
        # For a GPU the engine runs the backward pass in a thread of its own, unknown to Python. The
        # block stands in the thread that called `backward`: the one that has a block at all.
        foreign = isinstance(threading.current_thread(), threading._DummyThread)
        found = [block for block in list(_open_blocks) if id(self) in block.norms]
        if foreign and found and all(block.thread is found[0].thread for block in found):
            return found[-1]
        raise RuntimeError(
            "A backward pass runs this norm again (activation checkpointing), but its `condition` "
            "block has ended. Open it inside the checkpointed function, with the condition as one "
            "of its arguments, or call `backward` inside the block. If no condition is meant, open "
            "`condition(model, None)` there."
        )


class ConditionalLayerNorm(ConditionalNorm, nn.LayerNorm):
    r"""Layer norm whose scale and shift are moved by a condition.

    .. math:: \gamma_b = \gamma + W_\gamma\,h(c_b), \qquad \beta_b = \beta + W_\beta\,h(c_b)

    ``h`` is the identity, or with ``hidden_dim`` one layer with an activation. ``weight`` and
    ``bias`` are the base :math:`\gamma, \beta`, under the names of ``nn.LayerNorm``; the new
    parameters are ``cond_proj.*``. They have no bias, because the base is the bias.

    Args:
        normalized_shape: size of the last dimension. Norms over several axes are refused.
        cond_dim: length of the condition vector.
        hidden_dim, hidden_act: width of a hidden layer between condition and W, ``None`` for none,
            and its activation: "silu", "gelu", "relu" or "tanh".
        eps: added to the variance.
        zero_init: start W at zero, so that the norm begins as the plain one. Only the last layer
            is zero: of two zero layers in a row neither would ever get a gradient.
        device, dtype: of all parameters.
        bias: if false there is no base shift, and the condition moves the scale only.

    Raises:
        ValueError: if the norm covers several axes, or a size or activation makes no sense.

    Example:
        >>> norm = ConditionalLayerNorm(8, cond_dim=3)
        >>> x, cond = torch.randn(2, 5, 8), torch.randn(2, 3)
        >>> torch.allclose(norm(x, cond), nn.LayerNorm(8)(x), atol=2e-6)  # W starts at zero
        True
        >>> sorted(norm.state_dict())
        ['bias', 'cond_proj.weight', 'weight']
    """

    plain = nn.LayerNorm
    compute = staticmethod(conditional_layer_norm)

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        cond_dim: int,
        hidden_dim: int | None = None,
        hidden_act: str = "silu",
        eps: float = 1e-5,
        zero_init: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__(normalized_shape, eps, bias=bias, device=device, dtype=dtype)
        _attach_to_a_new_norm(self, cond_dim, hidden_dim, hidden_act, zero_init)

    @classmethod
    def from_layer_norm(
        cls,
        layer_norm: nn.LayerNorm,
        cond_dim: int,
        hidden_dim: int | None = None,
        hidden_act: str = "silu",
        zero_init: bool = True,
    ) -> "ConditionalLayerNorm":
        """Copy a layer norm, and give the copy a condition.

        Epsilon, parameters, dtype, device, mode and ``requires_grad`` are those of ``layer_norm``,
        which stays as it is. Without ``bias`` in it the condition moves the scale only.

        Raises:
            TypeError, ValueError: if it is not an ``nn.LayerNorm`` over one axis with parameters.
        """
        return _copy_of("layer_norm", layer_norm, cls, cond_dim, hidden_dim, hidden_act, zero_init)


class ConditionalRMSNorm(ConditionalNorm, nn.RMSNorm):
    r"""RMS norm whose scale is moved by a condition; it has no shift.

    .. math:: y_{bt} = x_{bt} / \sqrt{\tfrac1D \textstyle\sum_d x_{btd}^2 + \epsilon}
        \odot \gamma_b, \qquad \gamma_b = \gamma + W\,h(c_b)

    ``weight`` is the base :math:`\gamma`, as in ``nn.RMSNorm``; the new parameters are
    ``cond_proj.*``.

    Args:
        normalized_shape, cond_dim, hidden_dim, hidden_act, zero_init, device, dtype: as in
            :class:`ConditionalLayerNorm`.
        eps: added to the mean square; ``None``, as in ``nn.RMSNorm``, for the machine epsilon of
            the computation, 1.2e-7, or 2.2e-16 in float64.

    Raises:
        ValueError: as :class:`ConditionalLayerNorm`.

    Source: Zhang & Sennrich 2019, Root Mean Square Layer Normalization (arXiv 1910.07467).

    Example:
        >>> norm = ConditionalRMSNorm(8, cond_dim=3)
        >>> x, cond = torch.randn(2, 5, 8), torch.randn(2, 3)
        >>> torch.allclose(norm(x, cond), nn.RMSNorm(8)(x), atol=2e-6)  # W starts at zero
        True
        >>> sorted(norm.state_dict())
        ['cond_proj.weight', 'weight']
    """

    plain = nn.RMSNorm
    compute = staticmethod(conditional_rms_norm)

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        cond_dim: int,
        hidden_dim: int | None = None,
        hidden_act: str = "silu",
        eps: float | None = None,
        zero_init: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(normalized_shape, eps, device=device, dtype=dtype)
        _attach_to_a_new_norm(self, cond_dim, hidden_dim, hidden_act, zero_init)

    @classmethod
    def from_rms_norm(
        cls,
        rms_norm: nn.RMSNorm,
        cond_dim: int,
        hidden_dim: int | None = None,
        hidden_act: str = "silu",
        zero_init: bool = True,
    ) -> "ConditionalRMSNorm":
        """Copy an ``nn.RMSNorm``, as :meth:`ConditionalLayerNorm.from_layer_norm` does."""
        return _copy_of("rms_norm", rms_norm, cls, cond_dim, hidden_dim, hidden_act, zero_init)


class AdaLNZero(nn.Module):
    r"""Shifts, scales and gates of a DiT block, all zero at the start.

    .. math:: (t_1, s_1, g_1, t_2, s_2, g_2)_b = W\,\mathrm{SiLU}(c_b) + a, \qquad W = 0,\; a = 0

    The gates are zero, so each branch starts as if it were not there.

    Args:
        dim: width of the residual stream.
        cond_dim: length of the condition vector.
        n_outputs: number of vectors: 6 for a block of two branches, in the order shift, scale,
            gate, shift, scale, gate.
        device, dtype: of the parameters, ``linear.weight`` and ``linear.bias``.

    Raises:
        ValueError: if a size is not a whole number of 1 or more.

    Source: Peebles & Xie 2022 (DiT, arXiv 2212.09748), adaLN-Zero.

    Example:
        >>> from cln_tutorial.conditional_norm import gated_residual, modulated_layer_norm
        >>> from cln_tutorial.conditional_norm import gated_residual_modulated_layer_norm
        >>> attention, mlp, ada = nn.Linear(8, 8), nn.Linear(8, 8), AdaLNZero(8, cond_dim=3)
        >>> x, (t1, s1, g1, t2, s2, g2) = torch.randn(2, 5, 8), ada(torch.randn(2, 3))
        >>> h = attention(modulated_layer_norm(x, s1, t1))
        >>> x_new, h = gated_residual_modulated_layer_norm(x, h, g1, s2, t2)
        >>> gated_residual(x_new, mlp(h), g2).equal(x)  # closed gates
        True
    """

    def __init__(
        self,
        dim: int,
        cond_dim: int,
        n_outputs: int = 6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("dim", dim), ("cond_dim", cond_dim), ("n_outputs", n_outputs)):
            if not _whole(size):
                raise ValueError(f"`{name}` must be a whole number of 1 or more; got {size!r}.")
        self.n_outputs = n_outputs
        self.linear = nn.Linear(cond_dim, n_outputs * dim, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set weight and bias to zero."""
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, cond: Float[Tensor, "batch width"]) -> tuple[Float[Tensor, "batch dim"], ...]:
        """Return ``n_outputs`` tensors ``(batch, dim)`` for ``cond`` of ``(batch, cond_dim)``.

        Raises:
            TypeError, ValueError: if dtype, device or shape of ``cond`` do not fit.
        """
        _require_cond(cond, self.linear)
        moved = self.linear(nn.functional.silu(cond.to(self.linear.weight.dtype)))
        return moved.chunk(self.n_outputs, dim=1)


def conditional_class(plain: type[nn.Module], rms: bool) -> type[ConditionalNorm]:
    """Return the class that a norm of class ``plain`` takes when it gets a condition."""
    if plain is nn.LayerNorm:
        return ConditionalLayerNorm
    return ConditionalRMSNorm if plain is nn.RMSNorm else _subclass(plain, rms)


@functools.cache
def _subclass(plain: type[nn.Module], rms: bool) -> type[ConditionalNorm]:
    # A subclass: without a condition it is the plain norm in all it does, `isinstance` included.
    own = ConditionalRMSNorm if rms else ConditionalLayerNorm
    members = {"plain": plain, "compute": staticmethod(own.compute)}
    members["__reduce__"] = lambda self: (_blank, (plain, rms), self.__dict__)
    return type(f"Conditional{plain.__name__}", (ConditionalNorm, plain), members)


def _blank(plain: type[nn.Module], rms: bool) -> ConditionalNorm:
    cls = _subclass(plain, rms)
    return cls.__new__(cls)


def _attach_to_a_new_norm(
    norm: ConditionalNorm, cond_dim: int, hidden_dim: int | None, act: str, zero_init: bool
) -> None:
    if why := obstacle(norm, cond_dim, hidden_dim):
        raise ValueError(f"The conditional norm {why}")
    norm.attach(cond_dim, hidden_dim, act, zero_init)


def _copy_of(
    name: str,
    plain: nn.Module,
    cls: type[ConditionalNorm],
    cond_dim: int,
    hidden_dim: int | None,
    act: str,
    zero_init: bool,
) -> ConditionalNorm:
    if type(plain) is not cls.plain:
        wanted = f"nn.{cls.plain.__name__}"
        raise TypeError(f"`{name}` must be an {wanted} itself; got {type(plain)}.")
    if why := obstacle(plain, cond_dim, hidden_dim):
        raise ValueError(f"`{name}` {why}")
    norm = copy.deepcopy(plain)
    norm.__class__ = cls
    norm.attach(cond_dim, hidden_dim, act, zero_init)
    return norm


def _layers(norm: ConditionalNorm) -> list[nn.Linear]:
    return [layer for layer in norm.cond_proj.modules() if isinstance(layer, nn.Linear)]


def bias_of(norm: nn.Module) -> Tensor | None:
    return getattr(norm, "bias", None)  # an RMS norm of `transformers` has no such attribute


EPSILONS = ("eps", "variance_epsilon", "epsilon")


def stored_epsilon(norm: nn.Module) -> float | None:
    return next(getattr(norm, name) for name in EPSILONS if hasattr(norm, name))


def epsilon(norm: nn.Module, x: Tensor) -> float:
    eps = stored_epsilon(norm)
    return torch.finfo(wide_dtype(x)).eps if eps is None else eps  # as in nn.RMSNorm


def obstacle(norm: nn.Module, cond_dim: int, hidden_dim: int | None) -> str | None:
    wanted = [cond_dim] if hidden_dim is None else [cond_dim, hidden_dim]
    if isinstance(norm, ConditionalNorm) and hasattr(norm, "cond_proj"):
        sizes = [layer.in_features for layer in _layers(norm)]
        return None if sizes == wanted else f"has a condition already, of sizes {sizes}."
    weight, shape = getattr(norm, "weight", None), getattr(norm, "normalized_shape", ())
    if len(shape) > 1 or (weight is not None and weight.ndim != 1):
        shape = shape or tuple(weight.shape)
        return f"has `normalized_shape` {shape}, several axes; a condition needs one."
    if weight is None:
        return "has no parameters for a condition to move; make it with `elementwise_affine=True`."
    if not any(hasattr(norm, name) for name in EPSILONS):
        return f"has no epsilon under one of the names {EPSILONS}."
    if "forward" in vars(norm):
        return "has a `forward` of its own, which sees no condition; convert before it gets that."
    if not all(map(_whole, wanted)):
        return f"needs whole `cond_dim` and `hidden_dim` of 1 or more; got {wanted}."
    return None


def _whole(size: object) -> bool:
    return isinstance(size, numbers.Integral) and size >= 1


def _require_cond(cond: Tensor, first: nn.Linear) -> None:
    width, dtype = first.in_features, first.weight.dtype
    if isinstance(cond, Tensor) and not cond.is_floating_point():
        raise TypeError(
            f"`cond` must hold a vector of floats per example; got {cond.dtype}. Embed a "
            f"class first: `nn.Embedding(num_classes, {width})(label)`."
        )
    require_floats("cond", cond)
    if cond.device != first.weight.device:
        raise ValueError(
            f"`cond` is on {cond.device}, the norm on {first.weight.device}; move one of them."
        )
    if cond.ndim != 2 or cond.shape[1] != width:
        raise ValueError(f"`cond` must be (batch or 1, {width}); got {tuple(cond.shape)}.")
    if torch.promote_types(cond.dtype, dtype) != dtype:
        raise TypeError(f"`cond` is {cond.dtype}, the norm {dtype}; write `cond.to({dtype})`.")


def _beams(x: Tensor, cond: Tensor, expand_beams: bool) -> int:
    if expand_beams and len(cond) and len(x) % len(cond) == 0:
        return len(x) // len(cond)
    raise ValueError(
        f"`cond` must hold one row per example of `x` {tuple(x.shape)}, or one for all; got "
        f"{len(cond)}. For beams write `condition(model, cond, expand_beams=True)`, or "
        f"`cond.repeat_interleave(num_beams, dim=0)`."
    )


class _ThisThread(threading.local):
    def __init__(self) -> None:
        self.blocks: list[_Block] = []


@dataclass(eq=False)
class _Block:
    norms: frozenset[int]
    cond: Tensor | None
    expand_beams: bool
    thread: list["_Block"]  # the blocks of the thread that opened it
    used: bool = False


_this_thread = _ThisThread()
_open_blocks: list[_Block] = []  # of all threads


@contextlib.contextmanager
def condition(
    model: nn.Module, cond: Float[Tensor, "rows width"] | None, *, expand_beams: bool = False
) -> Iterator[None]:
    """Give every conditional norm of ``model`` the condition ``cond`` while the block runs.

    Blocks nest (the innermost that covers a norm wins), end with an exception too, and are seen by
    their own thread only. With activation checkpointing, open them in the checkpointed function,
    or call ``backward`` in the block; there the re-entrant kind wants ``cond`` to be a leaf.

    Args:
        model: a module with conditional norms.
        cond: ``(batch, cond_dim)`` or ``(1, cond_dim)``, or ``None`` for the base norms.
        expand_beams: let k rows in turn share a condition where the running batch is k times that
            of ``cond``: the order in which ``generate`` of ``transformers`` lays out its beams.

    Raises:
        TypeError, ValueError: if ``cond`` does not fit the norms, or ``model`` has none.
        RuntimeError: at the end of a block in which no norm used the condition.

    Example:
        >>> from cln_tutorial.conditional_norm import convert_layer_norms
        >>> model = convert_layer_norms(nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8)), cond_dim=3)
        >>> with condition(model, torch.randn(2, 3)):
        ...     y = model(torch.randn(2, 5, 4))
    """
    norms = conditional_norms(model)
    for norm in norms if cond is not None else []:
        _require_cond(cond, _layers(norm)[0])
    block = _Block(frozenset(map(id, norms)), cond, expand_beams, _this_thread.blocks)
    block.thread.append(block)
    _open_blocks.append(block)
    try:
        yield
    finally:
        block.thread.remove(block)
        _open_blocks.remove(block)
    if cond is not None and not block.used:
        raise RuntimeError(
            f"The condition was not used by any of the model's {len(norms)} conditional norms. Run "
            f"the model itself, not a copy, inside the block and in its thread."
        )


def conditional_norms(model: nn.Module) -> list[ConditionalNorm]:
    norms = [m for m in model.modules() if isinstance(m, ConditionalNorm)]
    if not norms:
        raise ValueError("`model` holds no conditional norm; call `convert_layer_norms` first.")
    return norms


def one_condition(cond: Tensor) -> Tensor:
    if not isinstance(cond, Tensor):
        raise TypeError(f"`cond` must be a tensor; got {type(cond).__name__}.")
    if cond.ndim == 1 or (cond.ndim == 2 and len(cond) == 1):
        return cond.reshape(1, -1)
    raise ValueError(
        f"`cond` must be one vector, (cond_dim,) or (1, cond_dim); got {tuple(cond.shape)}. For "
        f"several, fold once for each."
    )
