"""What all stand-ins share."""

from collections.abc import Mapping
from typing import Any

from cln_tutorial.weight_averaging.averages import ExponentialMovingAverage


class Shell:
    """An average that starts from the present weights, and its state."""

    def __init__(self, model_or_params: Any, **options: Any):
        self.average = ExponentialMovingAverage(model_or_params, bias_correction=False, **options)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of ``average``; the files of the peers are other ones."""
        return self.average.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state_dict` returned."""
        self.average.load_state_dict(state)
