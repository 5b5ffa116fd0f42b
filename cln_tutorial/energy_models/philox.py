"""Noise by counters: each number is a function of seed, stream, step, chain and coordinate alone.

Nothing is drawn in an order, so chains may be split over calls, threads and devices without a
change of a bit. The generator is Philox-4x32-10: from a counter of four words and a key of two it
makes four random words. Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from cln_tutorial._dtypes import wide_dtype
from cln_tutorial._transforms import values_are_hidden
from cln_tutorial.energy_models._checks import HAS_NUMBA, require_count

MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
KEY_STEPS = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10
WORD = 2**32


def counter_normal(
    seed: int,
    step: int,
    shape: Sequence[int],
    *,
    stream: int = 0,
    first_chain: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Float[Tensor, "n *event"]:
    r"""Return standard normal numbers that depend on their counter alone.

    .. math::
        \xi_{4b},\ \xi_{4b+1} = \sqrt{-2\ln u_0}\,(\cos 2\pi u_1,\ \sin 2\pi u_1), \qquad
        u_i = (w_i + \tfrac12)/2^{32}, \qquad
        w = \mathrm{Philox}_\mathrm{seed}(b, \mathrm{step}, \mathrm{chain}, \mathrm{stream}),

    and the same of :math:`w_2, w_3` for the coordinates :math:`4b + 2` and :math:`4b + 3`.

    Args:
        seed: the key, at least 0 and below 2**64.
        step: number of the step, at least 0 and below 2**32.
        shape: ``(n, *event)``, one row for each chain; the coordinates of an event are counted in
            the order of memory.
        stream: what the numbers are for, below 2**32: numbers of two streams are independent.
        first_chain: number of the chain in row 0; row ``i`` belongs to chain ``first_chain + i``.
        dtype: floating dtype of the numbers; half types are computed in float32.
        device: where they are made; the same numbers up to rounding.

    Returns:
        ``(n, *event)``. No number is larger than 6.77 in size.

    Raises:
        ValueError: if a number does not fit its word, or the shape has no rows.
        TypeError: if a count is no whole number, or ``dtype`` not floating.

    Source:
        Salmon et al. 2011 for the words, Box & Muller 1958 for the numbers.

    Example:
        >>> from cln_tutorial.energy_models.philox import counter_normal
        >>> both = counter_normal(0, 7, (4, 2))
        >>> second = counter_normal(0, 7, (2, 2), first_chain=2)  # a chunk of the same chains
        >>> both[2:].equal(second)
        True
    """
    shape = tuple(shape)
    if not shape:
        raise ValueError("`shape` must be (n, *event), one row for each chain; got ().")
    for length in shape:
        require_count("shape", length)
    require_counter(seed, step, shape[0], stream, first_chain)
    _require_floating_dtype(dtype)
    device = torch.empty(0, device=device).device
    n, width = shape[0], math.prod(shape[1:])
    if _numba_serves(dtype, device) and n * width:
        from cln_tutorial.energy_models.numba_loops import normals

        return normals(seed, step, stream, first_chain, n, width).view(shape)
    blocks = torch.arange(-(-width // 4), device=device)
    chains = torch.arange(first_chain, first_chain + n, device=device)
    words = philox((blocks, step, chains[:, None], stream), (seed % WORD, seed // WORD))
    pairs = [_box_muller(*pair, wide_dtype(dtype)) for pair in (words[:2], words[2:])]
    numbers = torch.stack([*pairs[0], *pairs[1]], -1).flatten(1)[:, :width]
    return numbers.reshape(shape).to(dtype)


def counter_uniform(
    seed: int,
    step: int,
    n: int,
    *,
    stream: int = 1,
    first_chain: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Float[Tensor, " n"]:
    r"""Return one uniform number of (0, 1) for each chain: :math:`u = (w_0 + \frac12)/2^{32}`.

    The word is the first that Philox makes of the counter (0, step, chain, stream). What would be
    rounded to 1 is the number below it, so the logarithm of each is finite and below 0.

    Args:
        seed: the key, at least 0 and below 2**64.
        step: number of the step, at least 0 and below 2**32.
        n: number of chains.
        stream: what the numbers are for, below 2**32; 1 is that of acceptance.
        first_chain: number of the chain of the first number.
        dtype: floating dtype of the numbers; in a half type the smallest ones may be rounded to 0.
        device: where they are made; the same numbers on each.

    Returns:
        ``(n,)``.

    Raises:
        ValueError: if a number does not fit its word.
        TypeError: if a count is no whole number, or ``dtype`` not floating.

    Source:
        Salmon et al. 2011.

    Example:
        >>> from cln_tutorial.energy_models.philox import counter_uniform
        >>> u = counter_uniform(0, step=3, n=1000)
        >>> bool((u > 0).all() and (u < 1).all())
        True
    """
    require_count("n", n)
    require_counter(seed, step, n, stream, first_chain)
    _require_floating_dtype(dtype)
    device = torch.empty(0, device=device).device
    if _numba_serves(dtype, device) and n:
        from cln_tutorial.energy_models.numba_loops import uniforms

        return uniforms(seed, step, stream, first_chain, n)
    chains = torch.arange(first_chain, first_chain + n, device=device)
    word = philox((0, step, chains, stream), (seed % WORD, seed // WORD))[0]
    return _uniform(word, wide_dtype(dtype)).to(dtype).clamp(max=1 - torch.finfo(dtype).eps / 2)


def philox(counter: Sequence[Tensor | int], key: Sequence[int]) -> list[Tensor]:
    """Return the four words, as int64 below 2**32, of counters that broadcast."""
    w0, w1, w2, w3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = _product(MULTIPLIERS[0], w0)
        high1, low1 = _product(MULTIPLIERS[1], w2)
        w0, w1, w2, w3 = high1 ^ w1 ^ k0, low1, high0 ^ w3 ^ k1, low0
        k0, k1 = (k0 + KEY_STEPS[0]) % WORD, (k1 + KEY_STEPS[1]) % WORD
    return list(torch.broadcast_tensors(w0, w1, w2, w3))


def require_counter(seed: int, step: int, n: int, stream: int, first_chain: int) -> None:
    """Refuse what is no counter: whole numbers that fit their words, so that nothing repeats."""
    counters = {"seed": seed, "step": step, "stream": stream, "first_chain": first_chain}
    for name, value in counters.items():
        require_count(name, value)
        bits = 64 if name == "seed" else 32
        last = value + max(n - 1, 0) if name == "first_chain" else value
        if last >= 2**bits:
            raise ValueError(f"`{name}` counts up to {last}, and must stay below 2**{bits}.")


# --- parts ----------------------------------------------------------------------------------------


def _product(multiplier: int, word: Tensor | int) -> tuple[Tensor | int, Tensor | int]:
    """Return the upper and the lower word of a product.

    It fills 64 bits: as int64 it wraps around to the same bits, and the mask drops copies of the
    sign that the shift brings in.
    """
    product = multiplier * word
    return (product >> 32) & (WORD - 1), product & (WORD - 1)


def _uniform(word: Tensor, dtype: torch.dtype) -> Tensor:
    return (word.to(dtype) + 0.5) / WORD


def _box_muller(radius: Tensor, angle: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    length = (-2 * _uniform(radius, dtype).log()).sqrt()
    turn = 2 * math.pi * _uniform(angle, dtype)
    return length * turn.cos(), length * turn.sin()


def _numba_serves(dtype: torch.dtype, device: torch.device) -> bool:
    fits = dtype == torch.float32 and device.type == "cpu"
    return fits and HAS_NUMBA and not values_are_hidden()


def _require_floating_dtype(dtype: torch.dtype) -> None:
    if not dtype.is_floating_point:
        raise TypeError(f"`dtype` must be a floating dtype; got {dtype}.")
