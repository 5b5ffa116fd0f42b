"""Whether PyTorch traces a function, or transforms it: then values are not there to look at."""

import torch

try:
    from torch._C import _are_functorch_transforms_active as transforms_are_active
except ImportError:  # without it a transform fails where a value is asked for, and says so

    def transforms_are_active() -> bool:
        """Return True under ``torch.func``, where this version of PyTorch can tell."""
        return False


def values_are_hidden() -> bool:
    """Return True while compiling, exporting, or under ``torch.func``."""
    return torch.compiler.is_compiling() or transforms_are_active()
