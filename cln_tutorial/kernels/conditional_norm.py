"""The conditional norms on a GPU: one kernel forward, one backward, and no atomics.

All three are bound by memory, so each tensor is read and written once, and everything is computed
in float32 whatever the storage type. The gradients of the conditions are sums over the rows of a
group: each program sums one chunk of rows in registers, and a small kernel adds up the chunks in
fixed order. So equal inputs give equal bits.
"""

import typing

import torch
import triton
import triton.language as tl
from torch import Tensor

# A shorter chunk would write more partial sums than it saves time: 16 bytes per channel and chunk.
SHORTEST_CHUNK = 32


def forward(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor | None,
    h: Tensor | None,
    gate: Tensor | None,
    eps: float,
    rms: bool,
    plus_one: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dim = x.shape[-1]
    rows = x.numel() // dim
    y = x.new_empty(x.shape)
    x_new = x.new_empty(0) if h is None else torch.empty_like(y)
    mean = x.new_empty(0 if rms else rows, dtype=torch.float32)
    rstd = x.new_empty(rows, dtype=torch.float32)
    shape = _shape(dim, rows)
    with torch.cuda.device_of(x):
        forward_kernel[(triton.cdiv(rows, shape["TILE"]),)](
            *_strided(x, h, gate, gamma, beta),
            y,
            None if h is None else x_new,
            None if rms else mean,
            rstd,
            rows,
            rows // len(gamma),
            eps,
            PLUS_ONE=plus_one,
            **shape,
        )
    return y, x_new, mean, rstd


def backward(
    dy: Tensor,
    dx_new: Tensor | None,
    x: Tensor,
    gamma: Tensor,
    mean: Tensor,
    rstd: Tensor,
    h: Tensor | None,
    gate: Tensor | None,
    beta_dtype: torch.dtype | None,
    rms: bool,
    plus_one: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    groups, dim = gamma.shape
    group_rows = x.numel() // (groups * dim)
    dx, dh = x.new_empty(x.shape), None if h is None else h.new_empty(h.shape)
    dtypes = gamma.dtype, beta_dtype, None if h is None else gate.dtype
    sums = [None if d is None else x.new_empty(groups, dim, dtype=d) for d in dtypes]
    chunk = _chunk(group_rows, groups, x)
    chunks = triton.cdiv(group_rows, chunk)
    partial = sums
    if chunks > 1:
        size, wide = (groups, chunks, dim), torch.float32
        partial = [None if s is None else x.new_empty(size, dtype=wide) for s in sums]
    with torch.cuda.device_of(x):
        backward_kernel[(groups * chunks,)](
            *_strided(dy, dx_new, x, h, gate, gamma),
            None if rms else mean,
            rstd,
            dx,
            dh,
            *partial,
            group_rows,
            chunk,
            chunks,
            PLUS_ONE=plus_one,
            **_shape(dim, group_rows),
        )
        if chunks > 1:
            reduce_kernel[(triton.cdiv(dim, 64), groups)](
                *partial, *sums, chunks, DIM=dim, BLOCK=64, num_warps=4, enable_fp_fusion=True
            )
    return tuple(x.new_empty(0) if t is None else t for t in (dx, *sums[:2], dh, sums[2]))


def _strided(*tensors: Tensor | None) -> list[Tensor | int | tl.constexpr | None]:
    """Take each tensor as rows, whose channels are neighbours, and add the stride of the rows."""
    listed = []
    for tensor in tensors:
        if tensor is None:
            listed += [None, None]
            continue
        rows = tensor.reshape(-1, tensor.shape[-1])
        rows = rows if rows.stride(1) == 1 else rows.contiguous()
        stride, dim = rows.stride(0), rows.shape[1]
        # Without gaps the stride is a constant, whose alignment the compiler knows. Of others it
        # asks whether 16 divides them: as a constant, each length of a text would be a new kernel.
        listed += [rows, tl.constexpr(dim) if stride == dim else stride]
    return listed


def _shape(dim: int, rows: int) -> dict[str, int | bool]:
    """One row per program, several if they are short; 8 channels per thread."""
    block = triton.next_power_of_2(dim)
    tile = min(triton.next_power_of_2(rows), max(1, 1024 // block))
    warps = min(max(block * tile // 256, 1), 32)
    # Said explicitly, because the default of this option changes with Triton 3.10.
    return {"DIM": dim, "BLOCK": block, "TILE": tile, "num_warps": warps, "enable_fp_fusion": True}


def _chunk(group_rows: int, groups: int, x: Tensor) -> int:
    """Rows per program: four programs for each multiprocessor, unless the chunks get too short."""
    processors = 8  # as good as any number in the interpreter
    if x.is_cuda:
        processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    return max(SHORTEST_CHUNK, triton.cdiv(group_rows, max(1, 4 * processors // groups)))


# --- the kernels ----------------------------------------------------------------------------------
# A tensor that is absent is None, for which Triton compiles a kernel of its own. The counts of rows
# do not specialise a kernel; the strides must, or no access would be wider than one element.


@triton.jit(do_not_specialize=["rows", "group_rows"])
@typing.no_type_check
def forward_kernel(
    x,
    x_stride,
    h,
    h_stride,
    gate,
    gate_stride,
    gamma,
    gamma_stride,
    beta,
    beta_stride,
    y,
    x_new,
    mean,
    rstd,
    rows,
    group_rows,
    eps,
    PLUS_ONE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (col < DIM)
    group = row // group_rows
    value = _load(x, row, x_stride, col, inside)
    if h is not None:
        branch = _load(gate, group, gate_stride, col, inside) * _load(h, row, h_stride, col, inside)
        stored = (value + branch).to(x_new.dtype.element_ty)
        _store(x_new, row, DIM, col, inside, stored)
        value = stored.to(tl.float32)
    if mean is not None:
        # Rounded to nearest, so that the mean of ones is one; on a GPU `/` may miss by two ulps.
        centre = tl.div_rn(tl.sum(value, 1, keep_dims=True), 1.0 * DIM)
        tl.store(mean + row, centre, row < rows)
        value = tl.where(inside, value - centre, 0.0)
    scale = tl.rsqrt(tl.sum(value * value, 1, keep_dims=True) / DIM + eps)
    tl.store(rstd + row, scale, row < rows)
    value *= scale
    factor = _load(gamma, group, gamma_stride, col, inside)
    value *= factor + 1 if PLUS_ONE else factor
    if beta is not None:
        value += _load(beta, group, beta_stride, col, inside)
    _store(y, row, DIM, col, inside, value)


@triton.jit(do_not_specialize=["group_rows", "chunk", "chunks"])
@typing.no_type_check
def backward_kernel(
    dy,
    dy_stride,
    dx_new,
    dx_new_stride,
    x,
    x_stride,
    h,
    h_stride,
    gate,
    gate_stride,
    gamma,
    gamma_stride,
    mean,
    rstd,
    dx,
    dh,
    dgamma,
    dbeta,
    dgate,
    group_rows,
    chunk,
    chunks,
    PLUS_ONE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    program = tl.program_id(0)
    group = tl.full([TILE, 1], program // chunks, tl.int32)
    first = program % chunks * chunk
    last = tl.minimum(first + chunk, group_rows)
    col = tl.arange(0, BLOCK)[None, :]
    sum_gamma = tl.zeros([TILE, BLOCK], tl.float32)
    sum_beta = tl.zeros([TILE, BLOCK], tl.float32)
    sum_gate = tl.zeros([TILE, BLOCK], tl.float32)
    for start in range(first, last, TILE):
        within = start + tl.arange(0, TILE)[:, None]
        row = group * group_rows + within
        inside = (within < last) & (col < DIM)
        grad = _load(dy, row, dy_stride, col, inside)
        value = _load(x, row, x_stride, col, inside)
        if mean is not None:
            value -= tl.load(mean + row, within < last, 0.0)
        scale = tl.load(rstd + row, within < last, 0.0)
        value *= scale
        sum_gamma += grad * value
        if dbeta is not None:
            sum_beta += grad
        factor = _load(gamma, group, gamma_stride, col, inside)
        w = (factor + 1 if PLUS_ONE else factor) * grad
        total = w - value * (tl.sum(w * value, 1, keep_dims=True) / DIM)
        if mean is not None:
            total -= tl.sum(w, 1, keep_dims=True) / DIM
        total *= scale
        if h is not None:
            total += _load(dx_new, row, dx_new_stride, col, inside)
            sum_gate += _load(h, row, h_stride, col, inside) * total
            _store(dh, row, DIM, col, inside, _load(gate, group, gate_stride, col, inside) * total)
        _store(dx, row, DIM, col, inside, total)
    _store(dgamma, program, DIM, col, col < DIM, tl.sum(sum_gamma, 0, keep_dims=True))
    if dbeta is not None:
        _store(dbeta, program, DIM, col, col < DIM, tl.sum(sum_beta, 0, keep_dims=True))
    if dgate is not None:
        _store(dgate, program, DIM, col, col < DIM, tl.sum(sum_gate, 0, keep_dims=True))


@triton.jit(do_not_specialize=["chunks"])
@typing.no_type_check
def reduce_kernel(
    partial_gamma,
    partial_beta,
    partial_gate,
    dgamma,
    dbeta,
    dgate,
    chunks,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    _add_chunks(partial_gamma, dgamma, chunks, DIM, BLOCK)
    if dbeta is not None:
        _add_chunks(partial_beta, dbeta, chunks, DIM, BLOCK)
    if dgate is not None:
        _add_chunks(partial_gate, dgate, chunks, DIM, BLOCK)


@triton.jit
@typing.no_type_check
def _add_chunks(partial, out, chunks, DIM: tl.constexpr, BLOCK: tl.constexpr):
    group = tl.program_id(1)
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    total = tl.zeros([32, BLOCK], tl.float32)
    for start in range(0, chunks, 32):
        number = start + tl.arange(0, 32)[:, None]
        inside = (number < chunks) & (col < DIM)
        total += _load(partial, group * chunks + number, DIM, col, inside)
    _store(out, group, DIM, col, col < DIM, tl.sum(total, 0, keep_dims=True))


@triton.jit
@typing.no_type_check
def _load(base, row, stride, col, inside):
    # Cast before anything else: in bfloat16 1 + s would be 1 for every -0.00195 <= s <= 0.0039.
    # The offset takes 64 bits: a tensor may have more than 2^31 elements.
    return tl.load(base + row.to(tl.int64) * stride + col, inside, 0.0).to(tl.float32)


@triton.jit
@typing.no_type_check
def _store(base, row, stride, col, inside, value):
    tl.store(base + row.to(tl.int64) * stride + col, value, inside)
