"""What Numba does not know of itself: bfloat16, and a number's bits (extra ``fast``)."""

from typing import no_type_check

import numpy as np
import torch
from numba import types
from numba.extending import intrinsic, overload

# A bfloat16 is the upper half of a float32, and numpy has no name for it.
NUMPY_DTYPES = {torch.float32: np.float32, torch.float64: np.float64, torch.bfloat16: np.uint16}


@intrinsic
@no_type_check
def read_as(typingctx, value, kind):
    """The bits of a number as a number of another type."""

    @no_type_check
    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], context.get_value_type(signature.return_type))

    del typingctx
    return kind.dtype(value, kind), generate


@no_type_check
def widen(value):
    """A bfloat16, read as its bits, becomes the float32 that it is; others stay."""


@overload(widen, inline="always")
@no_type_check
def _widen_by_type(value):
    if value is types.uint16:
        # All of it in 32 bits: in 64 it could not be read as a float32.
        return lambda value: read_as(np.uint32(np.uint32(value) << np.uint32(16)), np.float32)
    return lambda value: value
