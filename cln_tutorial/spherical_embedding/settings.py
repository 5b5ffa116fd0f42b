"""What a run of training is made of."""

import importlib.util
import math
from dataclasses import dataclass
from numbers import Integral, Real

import numpy as np
import torch
from jaxtyping import Float64, Shaped

from cln_tutorial.spherical_embedding.objective import require_rule

BACKENDS = ("auto", "numba", "torch")


@dataclass(frozen=True)
class Settings:
    """What a run is made of, checked at once.

    Attributes:
        dim: length of the vectors, at least 2.
        window: the largest half-width of a window, in words that stay.
        negative: noise words for each pair.
        margin: of the hinge, in (0, 4).
        lr: learning rate at the start; it falls linearly over all epochs.
        min_lr_ratio: below this share of ``lr`` it does not fall.
        sample: threshold of subsampling; 0 keeps all words.
        ns_exponent: exponent of the noise distribution.
        epochs: how often the corpus is read.
        objective, factor: see :mod:`objective`.
        shuffle: read the documents in another order in each epoch; else in that of the corpus,
            which leaks into their vectors.
        seed: of all random numbers, not negative.
        n_jobs: threads of backend "numba", or -1 for as many as there are cores.
        backend: "numba", "torch" or "auto": numba where it is installed and no device is named.
        batch_size: triples of one step of backend "torch"; 1 is the sequential rule.
        device: of backend "torch".
        infer_epochs: how often a new document is read.

    Raises:
        TypeError: if a number is no number.
        ValueError: if it is out of range, or a name unknown.
        NotImplementedError: for backend "triton".

    Example:
        >>> Settings(margin=5)
        Traceback (most recent call last):
            ...
        ValueError: `margin` must be more than 0 and less than 4; got 5.
    """

    dim: int = 100
    window: int = 10
    negative: int = 2
    margin: float | int = 0.15
    lr: float | int = 0.04
    min_lr_ratio: float | int = 1e-4
    sample: float | int = 1e-3
    ns_exponent: float | int = 0.75
    epochs: int = 10
    objective: str = "two_hinge"
    factor: str = "program"
    shuffle: bool = True
    seed: int = 0
    n_jobs: int = 1
    backend: str = "auto"
    batch_size: int = 1024
    device: str | torch.device | None = None
    infer_epochs: int = 20

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Integral):
                raise TypeError(f"`{name}` must be an integer; got {value!r}.")
            if value < least:
                raise ValueError(f"`{name}` must be at least {least}; got {value}.")
        for name, (is_allowed, words) in _RANGES.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Real):
                raise TypeError(f"`{name}` must be a number; got {value!r}.")
            if not is_allowed(value):
                raise ValueError(f"`{name}` must be {words}; got {value}.")
        if self.n_jobs == 0 or self.seed >= 2**64:
            raise ValueError(
                f"`n_jobs` must be positive or -1, and `seed` less than 2**64; "
                f"got {self.n_jobs}, {self.seed}."
            )
        require_rule(self.objective, self.factor)
        if self.backend == "triton":
            raise NotImplementedError("backend='triton' is not there yet; use 'numba' or 'torch'.")
        if self.device is not None:
            if self.backend == "numba":
                raise ValueError("`device` is of backend 'torch'; backend 'numba' runs on the CPU.")
            try:
                torch.device(self.device)
            except (RuntimeError, TypeError) as error:
                raise ValueError(
                    f"`device` must be one of PyTorch's; got {self.device!r}."
                ) from error
        if self.backend not in BACKENDS:
            names = ", ".join(map(repr, BACKENDS))
            raise ValueError(f"`backend` must be one of {names}; got {self.backend!r}.")

    def resolved_backend(self) -> str:
        """Return "numba" or "torch".

        Raises:
            ImportError: for "numba" where it is not installed.
        """
        has_numba = importlib.util.find_spec("numba") is not None
        if self.backend == "numba" and not has_numba:
            raise ImportError(
                "backend='numba' needs the extra: pip install 'cln-tutorial[fast]'. "
                "Without it use backend='torch', which is slower."
            )
        is_torch = self.backend == "torch" or self.device is not None or not has_numba
        return "torch" if is_torch else "numba"

    def learning_rates(
        self,
        seen: Shaped[np.ndarray, "places"],
        total: Shaped[np.ndarray, "places"] | int,
    ) -> Float64[np.ndarray, "places"]:
        r"""Return :math:`\eta\max(\rho, 1 - n/N)` after :math:`n` of :math:`N` tokens.

        All tokens count, before any is left out, over all epochs.

        Example:
            >>> Settings(lr=0.04).learning_rates(np.array([0, 50, 100]), total=100)
            array([4.e-02, 2.e-02, 4.e-06])
        """
        return self.lr * np.maximum(self.min_lr_ratio, 1 - seen / total)


_LEAST = {"dim": 2, "window": 1, "negative": 1, "epochs": 1, "batch_size": 1, "infer_epochs": 1}
_LEAST |= {"seed": 0, "n_jobs": -1}
_RANGES = {
    "margin": (lambda x: 0 < x < 4, "more than 0 and less than 4"),
    "lr": (lambda x: 0 < x <= 100, "more than 0 and at most 100"),
    "min_lr_ratio": (lambda x: 0 <= x <= 1, "from 0 to 1"),
    "sample": (lambda x: 0 <= x < math.inf, "a finite number, at least 0"),
    "ns_exponent": (math.isfinite, "finite"),
}
