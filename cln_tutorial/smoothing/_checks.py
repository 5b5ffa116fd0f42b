"""What all parts of the chapter share: checks of arguments, and the choice of a backend."""

import importlib.util
import math

import torch
from torch import Tensor

from cln_tutorial._transforms import values_are_hidden

HAS_NUMBA = importlib.util.find_spec("numba") is not None
_HALF = (torch.bfloat16, torch.float16)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums: float32 for half types, else the type itself."""
    return torch.float32 if dtype in _HALF else dtype


def require_floating(name: str, tensor: Tensor) -> None:
    """Refuse everything but real floating numbers."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"`{name}` must be a tensor of floating numbers; got {got}.")


def require_axis(name: str, tensor: Tensor, dim: int) -> int:
    """Return the axis counted from the end, of a floating tensor that has it."""
    require_floating(name, tensor)
    if not -tensor.ndim <= dim < tensor.ndim:
        raise ValueError(f"`dim` must be an axis of `{name}` {tuple(tensor.shape)}; got {dim}.")
    return dim if dim < 0 else dim - tensor.ndim


def require_temperature(
    temperature: "float | int | Tensor", shape: "tuple[int, ...] | torch.Size"
) -> None:
    """Refuse what is negative, infinite or NaN, and tensors that do not broadcast to ``shape``.

    ``shape`` is that of the input for element-wise functions, and has 1 at the reduced axis for
    those of a row. Values of tensors are looked at on a CPU only: a GPU would make us wait.
    """
    if isinstance(temperature, Tensor):
        require_floating("temperature", temperature)
        try:
            fits = torch.broadcast_shapes(temperature.shape, shape) == tuple(shape)
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(
                f"`temperature` must broadcast to {tuple(shape)}; got {tuple(temperature.shape)}."
            )
        if values_are_hidden() or temperature.device.type != "cpu":
            return
        good = bool(((temperature >= 0) & (temperature < math.inf)).all())
    else:
        good = 0 <= temperature < math.inf
    if not good:
        raise ValueError(f"`temperature` must be finite and at least 0; got {temperature}.")


def choose_backend(backend: str, x: Tensor) -> str:
    """Return "reference" or "numba": what was asked for, or the faster one that runs here."""
    if backend not in ("auto", "reference", "numba"):
        raise ValueError(f"`backend` must be 'auto', 'reference' or 'numba'; got {backend!r}.")
    if backend == "numba":
        if not HAS_NUMBA:
            raise ValueError(
                "`backend` 'numba' needs numba, the extra `fast`: pip install 'cln-tutorial[fast]'."
            )
        if x.device.type != "cpu":
            raise ValueError(f"`backend` 'numba' runs on a CPU; the input is on {x.device}.")
    if backend == "auto":
        return "numba" if HAS_NUMBA and x.device.type == "cpu" else "reference"
    return backend
