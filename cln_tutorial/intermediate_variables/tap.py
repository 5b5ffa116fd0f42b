"""A name for a tensor that no module returns."""

from typing import no_type_check

from torch import Tensor, nn


class Tap(nn.Module):
    """The identity, put where a tensor is to be seen: ``x = self.normalized(F.normalize(x))``.

    Hooks see what modules return and nothing between. A tap is a module that returns what it is
    given, so that ``capture`` sees it. It has no parameters, no entry in the ``state_dict`` (it can
    be added to a model whose checkpoints exist), and costs nothing measurable while nobody looks.

    Args:
        name: what ``capture`` shall call it, beside the qualified name that it has as a submodule.

    Source:
        Su Jianlin, article 6575, section 1: the tensor inside a layer that a second model cannot
        return and ``K.function`` can.

    Example:
        >>> import torch
        >>> from cln_tutorial.intermediate_variables.tap import Tap
        >>> x = torch.ones(2, 3)
        >>> Tap("scores")(x) is x, list(Tap().state_dict())
        (True, [])
    """

    def __init__(self, name: str | None = None) -> None:
        super().__init__()
        if name is not None and not isinstance(name, str):
            raise TypeError(f"`name` must be a string or None; got {type(name).__name__}.")
        if name == "":
            raise ValueError('`name` must not be empty: "" is the model itself.')
        self.name = name

    @no_type_check  # TorchScript needs the annotations, and other values than tensors may pass too
    def forward(self, x: Tensor) -> Tensor:
        """Return the argument itself.

        Args:
            x: anything; a tensor where the model is scripted.

        Returns:
            ``x``, the very object.
        """
        return x

    def extra_repr(self) -> str:
        """Show the name, if there is one."""
        return "" if self.name is None else repr(self.name)
