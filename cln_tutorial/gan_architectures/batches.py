"""Batches of images in memory, each a function of its number: a training finds its place again."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from cln_tutorial._dtypes import require_floating

Batch = Tensor | tuple[Tensor, Tensor]


class ShuffledBatches:
    """Batches of tensors in memory, in a new order in each epoch, as a function of their number.

    The order of an epoch is that of its number and the seed, so a run that is resumed finds its
    place without a state. The rest of an epoch that fills no batch is left out.

    Args:
        images: ``(n, ...)``.
        labels: ``(n,)``, for a conditional pair of networks.
        batch_size: images per batch.
        seed: of the orders.

    Raises:
        ValueError: for labels of another number, or fewer images than a batch.

    Example:
        >>> batches = ShuffledBatches(torch.arange(6.0), batch_size=2)
        >>> torch.cat([batches(number) for number in (0, 1, 2)]).sort().values
        tensor([0., 1., 2., 3., 4., 5.])
        >>> batches(7).equal(batches(7))
        True
    """

    def __init__(
        self,
        images: Shaped[Tensor, "n ..."],
        labels: Shaped[Tensor, "labels"] | None = None,
        *,
        batch_size: int,
        seed: int = 0,
    ):
        require_count("batch_size", batch_size)
        require_count("seed", seed, 0)
        if labels is not None and len(labels) != len(images):
            raise ValueError(f"`labels` must be one per image, {len(images)}; got {len(labels)}.")
        if len(images) < batch_size:
            raise ValueError(
                f"`images` must fill a batch of `batch_size` {batch_size}; got {len(images)}."
            )
        self.images, self.labels = images, labels
        self.batch_size, self.seed = batch_size, seed
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def __call__(self, number: int) -> Batch:
        """Return batch ``number``, counted from 0 over all epochs: images, or images and labels."""
        epoch, place = divmod(number, len(self.images) // self.batch_size)
        if epoch != self._epoch:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.images))
            self._epoch, self._order = epoch, torch.from_numpy(order).to(self.images.device)
        rows = self._order[place * self.batch_size : (place + 1) * self.batch_size]
        if self.labels is None:
            return self.images[rows]
        return self.images[rows], self.labels[rows.to(self.labels.device)]


def images_and_labels(batch: Any) -> tuple[Tensor, Tensor | None]:
    """Read what a loader gives: images, alone or in a tuple, or images and labels."""
    parts = batch if isinstance(batch, tuple | list) else [batch]
    if len(parts) not in (1, 2) or not all(isinstance(part, Tensor) for part in parts):
        raise TypeError(
            f"`loader` must give images, or (images, labels), as tensors; got "
            f"{[type(part).__name__ for part in parts]}."
        )
    x, y = parts if len(parts) == 2 else (parts[0], None)
    require_floating("loader", x)
    if y is not None and y.dtype != torch.int64:
        raise TypeError(f"`loader` must give labels of int64; got {y.dtype}.")
    if y is not None and y.shape != x.shape[:1]:
        raise ValueError(
            f"`loader` must give one label per image, shape {tuple(x.shape[:1])}; got "
            f"{tuple(y.shape)}."
        )
    return x, y


def require_count(name: str, value: int, least: int = 1) -> None:
    """Refuse what is no whole number, or a smaller one."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"`{name}` must be an integer of at least {least}; got {value!r}.")
