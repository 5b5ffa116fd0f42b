"""A model that returns what happens inside another one: the ``K.function`` of article 6575."""

from collections.abc import Iterable
from threading import get_ident
from typing import Any

from torch import nn

from cln_tutorial.intermediate_variables.capture import (
    NOT_RUN,
    Slot,
    copier,
    listening,
)
from cln_tutorial.intermediate_variables.selection import choose, require_module


def feature_extractor(model: nn.Module, names: str | Iterable[str]) -> nn.Module:
    """A module that runs the model and returns what the named modules inside return.

    The values are copies that stay in the graph, so that losses on them train the model. The
    forward pass ends as soon as the last one is there: what comes later in the model does not run.
    Of a module that is called several times it is the first call (``capture`` gives all). Nothing
    is changed in the model: it is the submodule ``model`` of the result, and has hooks only during
    the call.

    Args:
        model: any module, also a compiled one (which then runs as it is written).
        names: name or names, as for ``capture``.

    Returns:
        A module that is called as ``model`` and returns a dictionary from each name to the output
        of that module, in the order of ``names``.

    Raises:
        KeyError: for an unknown name, with the closest ones.
        ValueError: for no name, or one that two taps share.
        TypeError: if ``model`` is no module.
        RuntimeError: from the call, if the model returns and a module has not run.

    Source:
        Su Jianlin, article 6575, section 1: ``K.function([x_in], [layer.tensor])``.

    Example:
        >>> import torch
        >>> from cln_tutorial.intermediate_variables.extractor import feature_extractor
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU(), torch.nn.Flatten())
        >>> features = feature_extractor(model, ["0", "1"])(torch.ones(5, 3))
        >>> features["1"].equal(features["0"].relu())
        True
    """
    require_module(model)
    return _FeatureExtractor(model, [names] if isinstance(names, str) else list(names))


class _Enough(BaseException):
    """Ends a forward pass where everything wanted is there."""


class _FeatureExtractor(nn.Module):
    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names
        choose(model, names)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Run the model as far as needed.

        Args:
            *args: what the model takes.
            **kwargs: what the model takes by name.

        Returns:
            The output of each named module.
        """
        chosen, slots, enough = choose(self.model, self.names), {}, _Enough()

        def stop() -> None:
            if all(slot.calls for slot in slots.values()):
                raise enough

        kept, owner = copier(detach=False), get_ident()
        slots |= {name: Slot(owner, kept, "first", then=stop) for name in chosen.modules}
        pairs = [(module, slots[name]) for name, module in chosen.modules.items()]
        with listening(pairs):
            try:
                self.model(*args, **kwargs)
            except _Enough as signal:
                if signal is not enough:  # of an extractor around this one
                    raise
        found = {name: slots[chosen.entries[name]].calls for name in self.names}
        if missing := [name for name, calls in found.items() if not calls]:
            raise RuntimeError(f"the model returned, and did not run {missing}. {NOT_RUN}")
        return {name: calls[0] for name, calls in found.items()}

    def extra_repr(self) -> str:
        """Show the names."""
        return f"names={self.names}"
