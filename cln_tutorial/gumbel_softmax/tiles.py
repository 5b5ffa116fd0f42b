r"""Log-sum-exp of each tile of each row, the one pass over all logits that a draw needs.

The operator ``cln_tutorial::tile_log_sums`` is one for all devices; compiler and vmap take it as it
is. It has no gradient: what is drawn has none.
"""

import importlib
import importlib.util
from types import ModuleType

import torch
from torch import Tensor

from cln_tutorial.gumbel_softmax._checks import wide_dtype

_NUMBA, _TRITON = (importlib.util.find_spec(name) is not None for name in ("numba", "triton"))


def log_sums(rows: Tensor, tau: Tensor | float, width: int) -> tuple[Tensor, Tensor]:
    r"""Return the largest logit :math:`m` of each tile, and the rest of its log-sum-exp.

    .. math:: \log \sum_i e^{(o_i - m) / \tau}

    Args:
        rows: ``(rows, classes)``.
        tau: a number, or one of each row; positive.
        width: classes of a tile; the last one of a row may be shorter.

    Returns:
        Two tensors ``(rows, tiles)``, in float32 for half types. An infinite :math:`m` is not
        subtracted.
    """
    return torch.ops.cln_tutorial.tile_log_sums(
        rows,
        tau if isinstance(tau, Tensor) else None,
        1.0 if isinstance(tau, Tensor) else tau,
        width,
    )


@torch.library.custom_op("cln_tutorial::tile_log_sums", mutates_args=())
def _tile_log_sums(
    rows: Tensor, taus: Tensor | None, tau: float, width: int
) -> tuple[Tensor, Tensor]:
    if rows.numel() == 0:
        return _empty(rows, taus, tau, width)
    if _TRITON and rows.is_cuda and rows.dtype != torch.float64:
        return _kernels().log_sums(rows, taus, tau, width)
    if _NUMBA and rows.device.type == "cpu" and rows.dtype != torch.float16:
        loops = importlib.import_module("cln_tutorial.gumbel_softmax.numba_loops")
        return loops.log_sums(rows, taus, tau, width)
    return eager_log_sums(rows, taus, tau, width)


def eager_log_sums(
    rows: Tensor, taus: Tensor | None, tau: float, width: int
) -> tuple[Tensor, Tensor]:
    """Without a compiler."""
    whole = rows.shape[-1] // width * width
    tops, sums = [], []
    for part in (rows[:, :whole].unflatten(1, (-1, width)), rows[:, None, whole:]):
        if part.numel() == 0:
            continue
        part = part.to(wide_dtype(rows.dtype))
        top = part.amax(-1)
        shifted = part - top.masked_fill(top.isinf(), 0).unsqueeze(-1)
        if taus is not None or tau != 1:
            shifted /= tau if taus is None else taus.view(-1, 1, 1)
        tops.append(top)
        sums.append(shifted.exp_().sum(-1).log_())
    return torch.cat(tops, 1), torch.cat(sums, 1)


@_tile_log_sums.register_fake
def _empty(rows: Tensor, taus: Tensor | None, tau: float, width: int) -> tuple[Tensor, Tensor]:
    del taus, tau
    shape = rows.shape[0], -(-rows.shape[1] // width)
    tops = rows.new_empty(shape, dtype=wide_dtype(rows.dtype))
    return tops, torch.empty_like(tops)


@_tile_log_sums.register_vmap
def _over_batches(
    info: object, in_dims: tuple, rows: Tensor, taus: Tensor | None, tau: float, width: int
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    size = info.batch_size
    rows = rows.expand(size, *rows.shape) if in_dims[0] is None else rows.movedim(in_dims[0], 0)
    if taus is not None:
        taus = taus.expand(size, -1) if in_dims[1] is None else taus.movedim(in_dims[1], 0)
        taus = taus.reshape(-1)
    tops, sums = torch.ops.cln_tutorial.tile_log_sums(
        rows.reshape(-1, rows.shape[-1]), taus, tau, width
    )
    return (tops.unflatten(0, (size, -1)), sums.unflatten(0, (size, -1))), (0, 0)


@torch.library.custom_op("cln_tutorial::draw_from_tiles", mutates_args=())
def draw(
    rows: Tensor,
    tops: Tensor,
    log_sums: Tensor,
    taus: Tensor | None,
    tau: float,
    width: int,
    count: int,
    seed: Tensor,
) -> tuple[Tensor, Tensor]:
    """Run both races on a GPU; see ``kernels.gumbel_softmax.draw``."""
    return _kernels().draw(rows, tops, log_sums, taus, tau, width, count, seed)


@draw.register_fake
def _no_draw(
    rows: Tensor,
    tops: Tensor,
    log_sums: Tensor,
    taus: Tensor | None,
    tau: float,
    width: int,
    count: int,
    seed: Tensor,
) -> tuple[Tensor, Tensor]:
    del log_sums, taus, tau, width, seed
    largest = tops.new_empty(count, rows.shape[0])
    return torch.empty_like(largest, dtype=torch.int64), largest


def _kernels() -> ModuleType:
    return importlib.import_module("cln_tutorial.kernels.gumbel_softmax")
