"""Captions of images with a known optimum: rendered scenes, and scikit-learn's digits."""

import itertools
from collections import defaultdict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cln_tutorial.conditional_norm.grammar import END_WORD, Grammar

SIZES = {"small": 4.0, "large": 6.5}  # half the height and width, in pixels
COLOURS = {"red": (0.9, 0.2, 0.1), "yellow": (1.0, 0.9, 0.2), "blue": (0.2, 0.4, 1.0)}
KINDS = ("disc", "square", "triangle")
# Where the small shape stands, seen from the large one: to the right, downwards.
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
SIDE = 32  # of an image, in pixels


@dataclass(frozen=True)
class Shape:
    """One shape: a key of ``SIZES``, a key of ``COLOURS``, and one of ``KINDS``."""

    size: str
    colour: str
    kind: str

    def __str__(self) -> str:
        return f"{self.size} {self.colour} {self.kind}"


@dataclass(frozen=True)
class Scene:
    """One shape alone, or a small one whose place is told from a large one."""

    first: Shape
    relation: str | None = None
    second: Shape | None = None

    def captions(self) -> tuple[str, str, str, str]:
        """Return the four texts that describe this scene and no other.

        Example:
            >>> Scene(Shape("small", "red", "disc")).captions()[2:]
            ('only a small red disc', 'nothing but a small red disc')
            >>> SCENES[18].captions()[2]
            'left of a large yellow square is a small red disc'
        """
        a, b, relation = self.first, self.second, self.relation
        if b is None:
            return f"{a}", f"a {a}", f"only a {a}", f"nothing but a {a}"
        return (
            f"{a} {relation} {b}",
            f"a {a} {relation} a {b}",
            f"{relation} a {b} is a {a}",
            f"a {b} with a {a} {relation} it",
        )


_SHAPES = [Shape(*attributes) for attributes in itertools.product(SIZES, COLOURS, KINDS)]
# Two shapes differ in size, colour and kind: so few scenes can be learned while a page runs.
SCENES = (
    *[Scene(shape) for shape in _SHAPES],
    *[
        Scene(small, relation, large)
        for small, large in itertools.product(_SHAPES, repeat=2)
        if (small.size, large.size) == ("small", "large")
        and small.colour != large.colour
        and small.kind != large.kind
        for relation in RELATIONS
    ],
)


def scene_captions() -> Grammar:
    r"""Return the grammar of the captions; label ``i`` is ``SCENES[i]``.

    Each of the four captions of a scene has probability 1/4, and no text belongs to two scenes. So
    :math:`H(x \mid c) = \log 4`, and :math:`H(x) = \log 4K` for ``K`` equally likely scenes.

    Example:
        >>> grammar = scene_captions()
        >>> grammar.labels[18], grammar.entropy()[18].exp()
        ('small red disc left of large yellow square', tensor(4., dtype=torch.float64))
    """
    return _equally_likely({scene.captions()[0]: scene.captions() for scene in SCENES})


def render_scenes(
    scene: Int[Tensor, "batch"], generator: torch.Generator | None = None
) -> Float[Tensor, "batch 3 32 32"]:
    """Draw an image of every scene: RGB in 0..1 on dark grey, at random places, with noise.

    Places vary by 4 pixels to each side, along the relation by 1. So a shape is never cut off, and
    of two shapes each keeps to its own half.

    Args:
        scene: indices into ``SCENES``, int64 or int32.
        generator: source of the places and of the noise.

    Raises:
        TypeError, ValueError: if ``scene`` is not a row of such indices.

    Example:
        >>> images = render_scenes(torch.tensor([0, 18]), torch.Generator().manual_seed(0))
        >>> images.shape, images.dtype
        (torch.Size([2, 3, 32, 32]), torch.float32)
    """
    _require_scenes(scene)
    device = scene.device
    # By scene and shape; there are always two shapes, the second of a single one is not painted.
    half, colour, kind, painted, centre, jitter = (table.to(device)[scene] for table in _APPEARANCE)
    u = torch.rand(centre.shape, generator=generator, device=device)
    place = centre + jitter * (2 * u - 1)
    pixels = torch.arange(SIDE, device=device) + 0.5  # their centres
    x = (pixels - place[..., :1]).abs()[:, :, None]
    y = (pixels - place[..., 1:])[..., None]
    half, kind = half[..., None, None], kind[..., None, None]
    # Distance to the outline, negative inside; in the order of KINDS.
    disc = (x**2 + y**2).sqrt() - half
    square = torch.maximum(x, y.abs()) - half
    triangle = torch.maximum(y - half, (2 * x - y - half) / 5**0.5)
    distance = torch.where(kind == 0, disc, torch.where(kind == 1, square, triangle))
    # The share of a pixel that is covered, near enough: the edges are smooth.
    covered = (0.5 - distance).clamp(0, 1) * painted[..., None, None]
    images = torch.full((len(scene), 3, SIDE, SIDE), _BACKGROUND, device=device)
    for i in range(2):
        images.lerp_(colour[:, i, :, None, None], covered[:, i, None])
    noise = torch.rand(images.shape, generator=generator, device=device)
    return images.add_(noise.sub_(0.5), alpha=2 * _NOISE).clamp_(0, 1)


class ImageEncoder(nn.Module):
    """Small convolutional network from an image to one vector, the condition of a model.

    Two convolutions find features at 4 x 4 places; one linear layer sees their maxima (what is
    there) and all of them (where). Batch norm keeps the entries of the condition at one size while
    the encoder changes. So call ``eval()`` before you use it: until then images of a batch depend
    on each other.

    Args:
        cond_dim: length of the vector.
        channels, side: of the images, ``(batch, channels, side, side)``; ``side`` is a multiple
            of 8.

    Raises:
        TypeError, ValueError: if dtype or shape of the images, or ``side``, do not fit.

    Example:
        >>> ImageEncoder(cond_dim=5)(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 5])
    """

    def __init__(self, cond_dim: int, *, channels: int = 3, side: int = SIDE) -> None:
        super().__init__()
        if side < 8 or side % 8:
            raise ValueError(f"`side` must be a multiple of 8; got {side}.")
        self.shape, stride = (channels, side, side), side // 8
        self.features = nn.Sequential(
            nn.Conv2d(channels, 32, stride + 4, stride, padding=2),
            nn.ReLU(),
            nn.Conv2d(32, 32, 4, stride=2, padding=1),
            nn.ReLU(),
        )
        self.linear = nn.Linear(32 * (1 + 4 * 4), cond_dim)
        self.norm = nn.BatchNorm1d(cond_dim, affine=False)

    def forward(
        self, images: Float[Tensor, "batch channels side side"]
    ) -> Float[Tensor, "batch cond_dim"]:
        """Return the vector of each image; their pixels lie in 0..1."""
        if not isinstance(images, Tensor) or not images.is_floating_point():
            got = getattr(images, "dtype", type(images).__name__)
            raise TypeError(f"`images` must be floating point, in 0..1; got {got}.")
        if images.shape[1:] != self.shape:
            expected = ", ".join(map(str, self.shape))
            raise ValueError(f"`images` must be (batch, {expected}); got {tuple(images.shape)}.")
        features = self.features(5 * (images - 0.2))  # most pixels are dark: about 0 +- 1
        vector = self.linear(torch.cat([features.amax(dim=(2, 3)), features.flatten(1)], dim=1))
        return 0.5 * self.norm(vector)  # so large that W, which starts at zero, learns fast


def digit_captions() -> Grammar:
    r"""Return the grammar of the captions of digits; label 3 is "three".

    As in :func:`scene_captions`, :math:`H(x \mid c) = \log 4`.

    Example:
        >>> grammar = digit_captions()
        >>> grammar.labels[3], grammar.parse(grammar.encode(["a handwritten three"])).nonzero()
        ('three', tensor([[0, 3]]))
    """
    names = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    openings = ("the digit", "a handwritten", "this reads", "somebody wrote")
    return _equally_likely({name: tuple(f"{each} {name}" for each in openings) for name in names})


def handwritten_digits() -> tuple[Float[Tensor, "1797 1 8 8"], Int[Tensor, "1797"]]:
    """Return scikit-learn's images of digits, grey in 0..1, and which digit each shows.

    Source: Alpaydin & Kaynak 1998, Optical Recognition of Handwritten Digits, the UCI Machine
    Learning Repository.

    Example:
        >>> images, digit = handwritten_digits()
        >>> images.shape, digit[:4]
        (torch.Size([1797, 1, 8, 8]), tensor([0, 1, 2, 3]))
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return torch.from_numpy(bunch.images / 16).float()[:, None], torch.from_numpy(bunch.target)


_BACKGROUND, _NOISE = 0.15, 0.05


def _appearance(scene: Scene) -> tuple[list, ...]:
    shapes = [scene.first, scene.second or scene.first]
    direction = RELATIONS.get(scene.relation, (0, 0))
    centres = [[SIDE / 2 + sign * SIDE / 4 * d for d in direction] for sign in (1, -1)]
    jitter = [1.0 if d else 4.0 for d in direction]  # little towards each other and the frame
    return (
        [SIZES[shape.size] for shape in shapes],
        [COLOURS[shape.colour] for shape in shapes],
        [KINDS.index(shape.kind) for shape in shapes],
        [1.0, float(scene.second is not None)],
        centres,
        [jitter] * 2,
    )


_APPEARANCE = [torch.tensor(column) for column in zip(*map(_appearance, SCENES), strict=True)]


def _require_scenes(scene: Tensor) -> None:
    if not isinstance(scene, Tensor) or scene.dtype not in (torch.int32, torch.int64):
        got = getattr(scene, "dtype", type(scene).__name__)
        raise TypeError(f"`scene` must be a tensor of int64 or int32, indices; got {got}.")
    if scene.ndim != 1:
        raise ValueError(f"`scene` must be (batch,), one index each; got {tuple(scene.shape)}.")
    if len(scene) and not 0 <= scene.min() <= scene.max() < len(SCENES):
        got = f"{scene.min()}..{scene.max()}"
        raise ValueError(f"`scene` must lie in 0..{len(SCENES) - 1}, indices of SCENES; got {got}.")


def _equally_likely(captions: Mapping[str, tuple[str, ...]]) -> Grammar:
    labels = {
        name: tuple(tuple(text.split()) for text in texts) for name, texts in captions.items()
    }
    return Grammar(labels, _next_words)


def _next_words(texts: tuple[tuple[str, ...], ...]) -> dict[str, tuple[float, Hashable]]:
    # A state is what remains of the texts that are still possible, one as likely as another.
    after = defaultdict(list)
    for text in texts:
        after[text[0] if text else END_WORD].append(text[1:])
    return {word: (len(rest) / len(texts), tuple(rest)) for word, rest in after.items()}
