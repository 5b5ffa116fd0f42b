"""A small image classifier whose features the metrics compare: ours, not Inception's.

Figures on its features can be compared with each other, and with nothing that is published.

Source: the features of Kynkäänniemi et al. 2019 and Bińkowski et al. 2018 are those of Inception;
an own network does for small images what it does there, and needs no download.
"""

import json
import os

import torch
from jaxtyping import Float, Int64
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from cln_tutorial._dtypes import require_floating
from cln_tutorial._files import write_atomically
from cln_tutorial.gan_architectures.batches import require_count

METADATA = "cln_tutorial.FeatureClassifier"
N_FEATURES = 64
CHUNK = 1024  # images that are classified at a time

Images = Float[Tensor, "n channels size size"]
Labels = Int64[Tensor, " n"]


class FeatureClassifier:
    r"""A convolutional network that learns to classify, and gives features, in the way of sklearn.

    .. math:: \phi(x) = \frac1s \operatorname{relu}\bigl(W h(x) + b\bigr) \in \mathbb R^{64},
        \qquad s^2 = \overline{\operatorname{relu}(Wh+b)^2} \text{ over the training images}

    Two convolutions with pooling make :math:`h`; one more linear layer on the features gives the
    logits. Dividing by the root mean square :math:`s` once, on real images, makes the features fit
    for a kernel that is not free of scale, as that of :func:`.kernel_distance` is not.

    Initial weights and the order of the images come from a generator of its own: the same ``seed``
    gives the same network, bit for bit on one thread of one machine, and PyTorch's global state
    stays as it was.

    Args:
        n_epochs: passes over the training images.
        batch_size: images per step.
        seed: of the generator.
        progress: whether to show a bar while fitting.

    Attributes:
        n_classes_: number of classes.
        image_shape_: ``(channels, size, size)`` of the images it was fitted to.
        scale_: the root mean square :math:`s` by which features are divided.
        network_: the fitted network, in eval mode.

    Source:
        Own, with the one-cycle schedule of Smith & Topin 2018.

    Example:
        >>> from cln_tutorial.gan_architectures.classifier import FeatureClassifier
        >>> dark_or_light = torch.tensor([0, 1]).repeat(32)
        >>> images = (2.0 * dark_or_light - 1).reshape(-1, 1, 1, 1).expand(-1, 1, 8, 8)
        >>> classifier = FeatureClassifier(progress=False).fit(images, dark_or_light)
        >>> classifier.predict(images).equal(dark_or_light)
        True
        >>> features = classifier.transform(images)
        >>> features.shape, round(features.square().mean().item(), 3)
        (torch.Size([64, 64]), 1.0)
    """

    def __init__(
        self, *, n_epochs: int = 3, batch_size: int = 128, seed: int = 0, progress: bool = True
    ) -> None:
        require_count("n_epochs", n_epochs)
        require_count("batch_size", batch_size)
        self.n_epochs, self.batch_size = n_epochs, batch_size
        self.seed, self.progress = seed, progress

    def fit(self, images: Images, labels: Labels) -> "FeatureClassifier":
        """Train a new network on labelled real images.

        Args:
            images: ``(n, channels, size, size)``, float32, usually in [-1, 1]; a size that 4
                divides.
            labels: ``(n,)``, int64, from 0 on. The number of classes is the largest plus one.

        Returns:
            Itself, fitted, on the device of the images.

        Raises:
            TypeError, ValueError: for other dtypes or shapes, no image, or negative labels.
            FloatingPointError: for features that are all 0, or not finite as those of nan are.
        """
        from tqdm import tqdm

        self._require_images(images)
        channels, size = images.shape[1], images.shape[-1]
        if images.shape[-2] != size or size % 4 or 0 in images.shape:
            raise ValueError(
                f"`images` must be square, (n, channels, size, size) with a size that 4 divides; "
                f"got {tuple(images.shape)}."
            )
        if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
            got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
            raise TypeError(f"`labels` must be a tensor of int64; got {got}.")
        if labels.shape != images.shape[:1]:
            raise ValueError(
                f"`labels` must be one number per image, shape ({len(images)},); got shape "
                f"{tuple(labels.shape)}."
            )
        if labels.min() < 0:
            raise ValueError(f"`labels` must be at least 0; got {labels.min().item()}.")
        rng = torch.Generator().manual_seed(self.seed)
        n_classes = int(labels.max()) + 1
        network = _network(channels, size, n_classes, rng).to(images.device)
        steps = self.n_epochs * -(-len(images) // self.batch_size)
        optimizer = torch.optim.Adam(network.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 8e-3, total_steps=max(2, steps))
        with (
            torch.enable_grad(),
            torch.autocast(images.device.type, enabled=False),
            tqdm(total=steps, unit=" steps", disable=not self.progress) as bar,
        ):
            for _ in range(self.n_epochs):
                order = torch.randperm(len(images), generator=rng).to(images.device)
                for batch in order.split(self.batch_size):
                    loss = nn.functional.cross_entropy(network(images[batch]), labels[batch])
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    schedule.step()
                    bar.update()
        features = _in_chunks(network.eval()[:-1], images)
        scale = features.cpu().double().square().mean().sqrt().item()
        if not 0 < scale < float("inf"):
            raise FloatingPointError(
                f"the features of `images` are all 0, or not finite: their root mean square is "
                f"{scale}."
            )
        self.network_, self.n_classes_ = network, n_classes
        self.image_shape_, self.scale_ = (channels, size, size), scale
        return self

    def transform(self, images: Images) -> Float[Tensor, "n features"]:
        """Return the features of images, over ``scale_``.

        Args:
            images: of the shape, dtype and device that it was fitted to.

        Returns:
            ``(n, 64)``, at least 0, float32, without a graph.

        Raises:
            TypeError, ValueError: for images of another dtype or shape.
            RuntimeError: before :meth:`fit`.
        """
        return self._run(images, self._fitted()[:-1]) / self.scale_

    def predict_proba(self, images: Images) -> Float[Tensor, "n classes"]:
        """Return the probability of each class.

        Args:
            images: as in :meth:`transform`.

        Returns:
            ``(n, n_classes_)``, float32, without a graph.

        Raises:
            TypeError, ValueError, RuntimeError: as :meth:`transform`.
        """
        return self._run(images, self._fitted()).softmax(1)

    def predict(self, images: Images) -> Labels:
        """Return the most probable class.

        Args:
            images: as in :meth:`transform`.

        Returns:
            ``(n,)``, int64.

        Raises:
            TypeError, ValueError, RuntimeError: as :meth:`transform`.
        """
        return self._run(images, self._fitted()).argmax(1)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the fitted classifier to a safetensors file, which is replaced as a whole.

        Args:
            path: of the file.

        Raises:
            RuntimeError: before :meth:`fit`.
        """
        state = {key: value.contiguous() for key, value in self._fitted().state_dict().items()}
        about = {
            "n_epochs": self.n_epochs,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "n_classes": self.n_classes_,
            "image_shape": self.image_shape_,
            "scale": self.scale_,
        }
        write_atomically(path, save(state, {METADATA: json.dumps(about)}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "FeatureClassifier":
        """Read what :meth:`save` has written.

        Args:
            path: of the file.

        Returns:
            A fitted classifier on the CPU, with the same features to the bit.

        Raises:
            ValueError: for another file, or one that is cut off.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no dict
        except SafetensorError as error:
            raise ValueError(f"{path} is no safetensors file, or cut off: {error}.") from error
        if METADATA not in metadata:
            raise ValueError(f"{path} was not written by `save`: it has no {METADATA!r}.")
        about = json.loads(metadata[METADATA])
        new = cls(n_epochs=about["n_epochs"], batch_size=about["batch_size"], seed=about["seed"])
        new.image_shape_, new.n_classes_ = tuple(about["image_shape"]), about["n_classes"]
        new.scale_ = about["scale"]
        channels, size, _ = new.image_shape_
        new.network_ = _network(channels, size, new.n_classes_, torch.Generator()).eval()
        new.network_.load_state_dict(state)
        return new

    def _run(self, images: Tensor, network: nn.Module) -> Tensor:
        self._require_images(images)
        if tuple(images.shape[1:]) != self.image_shape_:
            raise ValueError(
                f"`images` must be (n, *{self.image_shape_}), as those that it was fitted to; got "
                f"{tuple(images.shape)}."
            )
        return _in_chunks(network, images)

    def _fitted(self) -> nn.Sequential:
        if not hasattr(self, "network_"):
            raise RuntimeError("this FeatureClassifier is not fitted yet; call `fit` first.")
        return self.network_

    @staticmethod
    def _require_images(images: Tensor) -> None:
        require_floating("images", images)
        if images.ndim != 4 or images.dtype != torch.float32:
            raise ValueError(
                f"`images` must be (n, channels, size, size) in float32; got "
                f"{tuple(images.shape)} in {images.dtype}."
            )


@torch.no_grad()
def _in_chunks(network: nn.Module, images: Tensor) -> Tensor:
    with torch.autocast(images.device.type, enabled=False):
        return torch.cat([network(chunk) for chunk in images.split(CHUNK)])


def _network(channels: int, size: int, n_classes: int, rng: torch.Generator) -> nn.Sequential:
    # Made without values first: the layers would take those from PyTorch's global generator.
    with torch.device("meta"):
        network = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * (size // 4) ** 2, N_FEATURES),
            nn.ReLU(),
            nn.Linear(N_FEATURES, n_classes),
        )
    network.float().to_empty(device="cpu")
    for layer in network:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=rng)
            nn.init.zeros_(layer.bias)
    return network
