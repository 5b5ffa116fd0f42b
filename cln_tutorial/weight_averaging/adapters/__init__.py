"""The interfaces of other libraries over our averages, so that their users change one import.

Each class has the constructor, the methods and the decays of the class that it stands in for. What
differs is in its docstring; and all of them average tied weights once, keep a float32 average of
weights of 16 bits, and take the further options of
:class:`~cln_tutorial.weight_averaging.ExponentialMovingAverage`, which stands in ``.average``.
"""

from cln_tutorial.weight_averaging.adapters.callbacks import lightning_callback, trainer_callback
from cln_tutorial.weight_averaging.adapters.models import EMA, AveragedModel, ModelEmaV3
from cln_tutorial.weight_averaging.adapters.parameters import EMAModel, TorchEMA

__all__ = [
    "EMA",
    "AveragedModel",
    "EMAModel",
    "ModelEmaV3",
    "TorchEMA",
    "lightning_callback",
    "trainer_callback",
]
