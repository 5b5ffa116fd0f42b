"""Norms whose scale and shift are functions of a class, of the noise, or of a style vector."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm

from cln_tutorial._dtypes import wide_dtype
from cln_tutorial.gan_architectures._batch_norm import FusedNorm2d
from cln_tutorial.gan_architectures._conditions import (
    condition_vector,
    of_classes,
    require_maps,
    require_not_negative,
    require_one_of,
    require_rows,
    require_sizes,
)
from cln_tutorial.gan_architectures.functional import (
    minibatch_std,
    modulated_batch_norm,
    modulated_instance_norm,
    pixel_norm,
)

NORMS = ("batch", "instance", "layer", "channel", "group", "pixel", "none")
LABEL_FORMS = ("paper", "article")


class ModulatedNorm2d(FusedNorm2d):
    r"""The family: a norm without parameters, then scale and shift that a condition gives.

    .. math:: \mathrm{out}_n = \gamma(c_n)\,N(h)_n + \beta(c_n), \qquad
        \gamma(c) = 1 + W_\gamma c + a_\gamma, \quad \beta(c) = W_\beta c + a_\beta

    ``gain`` and ``shift`` are the two linear maps. They start at zero, so that the norm begins as
    the plain one: bit for bit in the reference of :func:`modulated_batch_norm`, to rounding in the
    faster backends that large maps get. What N takes mean and variance over:

    ========== =================================== ==============================================
    ``norm``   one mean and variance per           as in
    ========== =================================== ==============================================
    "batch"    channel, over the whole batch       batch norm; running statistics in ``eval()``
    "instance" channel of one map                  AdaIN, StyleGAN
    "layer"    map, over all its channels          layer norm of ResNet GANs
    "channel"  position, over its channels         layer norm of article 7124
    "group"    group of channels of one map        group norm
    "pixel"    position, root mean square only     pixel norm of progressive GANs
    "none"     nothing: N is the identity          FiLM
    ========== =================================== ==============================================

    On maps of 1x1 "layer" and "channel" are the same. All are subclasses of PyTorch's batch norm:
    in ``norm="batch"`` running statistics, ``momentum=None`` (cumulative) and ``state_dict`` are
    its own, and :func:`~cln_tutorial.weight_averaging.recompute_batchnorm_` finds them. They stay
    in float32 in a half-precision module, where their small steps would be rounded away.
    ``nn.SyncBatchNorm.convert_sync_batchnorm`` would drop the condition: leave it.

    Args:
        num_features: channels C.
        cond_dim: length of the condition vector.
        norm: see the table.
        groups: number of groups of ``norm="group"``.
        bias: whether ``gain`` and ``shift`` have the biases :math:`a`.
        init_std: standard deviation of the initial W; the biases start at 0.
        eps: added to the variance, or to the mean square.
        momentum, track_running_stats: of ``norm="batch"``, as in ``nn.BatchNorm2d``.
        activation: ``None``, "relu" or "leaky_relu", in the same pass.
        negative_slope: of "leaky_relu".
        upsample: 1, or 2 for nearest-neighbour upsampling behind the activation.
        device, dtype: of the parameters.

    Raises:
        ValueError: if a size or a name makes no sense.

    Source: article 6549; Perez et al. 2018 (FiLM, arXiv 1709.07871).

    Example:
        >>> norm = ModulatedNorm2d(8, cond_dim=3, norm="group", groups=4)
        >>> x, cond = torch.randn(2, 8, 5, 5), torch.randn(2, 3)
        >>> torch.allclose(norm(x, cond), nn.GroupNorm(4, 8)(x))  # W starts at zero
        True
        >>> sorted(norm.state_dict())
        ['gain.bias', 'gain.weight', 'shift.bias', 'shift.weight']
    """

    def __init__(
        self,
        num_features: int,
        cond_dim: int,
        *,
        norm: str = "batch",
        groups: int = 32,
        bias: bool = True,
        init_std: float | int = 0.0,
        eps: float | int = 1e-5,
        momentum: float | int | None = 0.1,
        track_running_stats: bool = True,
        activation: str | None = None,
        negative_slope: float | int = 0.2,
        upsample: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        require_sizes(num_features=num_features, cond_dim=cond_dim)
        require_one_of("norm", norm, NORMS)
        require_not_negative(init_std=init_std)
        if norm == "group":
            require_sizes(groups=groups)
            if num_features % groups:
                raise ValueError(f"`groups` must divide {num_features} channels; got {groups}.")
        super().__init__(
            num_features,
            affine=False,
            track_running_stats=track_running_stats and norm == "batch",
            eps=eps,
            momentum=momentum,
            activation=activation,
            negative_slope=negative_slope,
            upsample=upsample,
            device=device,
            dtype=dtype,
        )
        self.cond_dim, self.norm, self.groups, self.init_std = cond_dim, norm, groups, init_std
        options = {"bias": bias, "device": device, "dtype": dtype}
        self.gain = nn.Linear(cond_dim, num_features, **options)
        self.shift = nn.Linear(cond_dim, num_features, **options)
        self._start([self.gain, self.shift], init_std)

    def forward(
        self, x: Float[Tensor, "batch channels height width"], cond: Float[Tensor, "batch cond_dim"]
    ) -> Float[Tensor, "batch channels new_height new_width"]:
        """Normalise ``x`` and modulate map n by row n of ``cond``.

        Raises:
            TypeError, ValueError: if dtype, batch or width of ``x`` or ``cond`` do not fit.
        """
        return self._modulate(x, "cond", cond)

    def gamma_beta(
        self, cond: Float[Tensor, "rows cond_dim"]
    ) -> tuple[Float[Tensor, "rows channels"], Float[Tensor, "rows channels"]]:
        """Return scale and shift under ``cond``, in float32 or better."""
        cond = condition_vector("cond", cond, self.gain)
        return self._read(self.gain(cond), self.shift(cond))

    def reset_parameters(self) -> None:
        """Start anew: running statistics 0 and 1, ``gain`` and ``shift`` as at construction."""
        super().reset_parameters()
        if hasattr(self, "gain"):  # not yet when PyTorch's class makes its own buffers
            self._start([self.gain, self.shift], self.init_std)

    def extra_repr(self) -> str:
        """Name the norm, and what follows it."""
        return f"{super().extra_repr()}, norm={self.norm!r}"

    @staticmethod
    def _start(heads: list[nn.Linear], std: float) -> None:
        for head in heads:
            nn.init.normal_(_stored_weight(head), std=std)
            if head.bias is not None:
                nn.init.zeros_(head.bias)

    @staticmethod
    def _read(gain: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        # In bfloat16 1 + gain is 1 for |gain| < 0.0019: the sum is float32.
        return 1 + gain.to(wide_dtype(gain.dtype)), shift.to(wide_dtype(shift.dtype))

    def _modulate(self, x: Tensor, name: str, *condition: Tensor | None) -> Tensor:
        # Before `gamma_beta`, which under spectral norm is a step of the power iteration.
        require_maps(x, self.num_features)
        require_rows(name, condition[0], x)
        gamma, beta = self.gamma_beta(*condition)
        if self.norm == "batch":
            return self._batch_norm(x, gamma, beta)
        if self.norm == "instance":
            return modulated_instance_norm(x, gamma, beta, eps=self.eps, **self._after)
        h = _normalised(x.to(wide_dtype(x.dtype)), self.norm, self.groups, self.eps)
        # Batch norm with mean 0 and variance 1 is what remains: scale, shift, and what follows.
        mean, variance = h.new_zeros(self.num_features), h.new_ones(self.num_features)
        out = modulated_batch_norm(
            h, gamma, beta, mean, variance, training=False, eps=0.0, **self._after
        )
        return out.to(x.dtype)


class ConditionalBatchNorm2d(ModulatedNorm2d):
    r"""Batch norm with a scale and a shift for each class.

    .. math:: \mathrm{out}_n = \gamma_{y_n} \frac{h_n - \mu}{\sqrt{\sigma^2 + \epsilon}}
        + \beta_{y_n}

    The statistics are those of the whole batch, of all classes together: after the normalisation a
    class does not have mean 0, only the mean over all classes, weighted by their frequency, is 0.
    The running statistics therefore belong to the mix of labels in training.

    ``gain.weight`` holds :math:`\gamma_k - 1` and ``shift.weight`` :math:`\beta_k`, one column per
    class. The columns are looked up, so that forward hooks on the two layers do not run.

    Args:
        num_features: channels C.
        num_classes: number of classes K.
        init_std: standard deviation of the initial ``gain`` and ``shift``; with 0 the norm begins
            as batch norm without parameters.
        eps, momentum, track_running_stats, activation, negative_slope, upsample, device, dtype: as
            in :class:`ModulatedNorm2d`.

    Raises:
        ValueError: as :class:`ModulatedNorm2d`.

    Source: article 6549; de Vries et al. 2017 (arXiv 1707.00683), Miyato & Koyama 2018
        (arXiv 1802.05637).

    Example:
        >>> norm = ConditionalBatchNorm2d(8, num_classes=10, activation="relu")
        >>> x, y = torch.randn(2, 8, 4, 4), torch.tensor([3, 7])
        >>> norm(x, y).equal(norm(x, nn.functional.one_hot(y, 10).float()))
        True
    """

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        *,
        init_std: float | int = 0.0,
        eps: float | int = 1e-5,
        momentum: float | int | None = 0.1,
        track_running_stats: bool = True,
        activation: str | None = None,
        negative_slope: float | int = 0.2,
        upsample: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        require_sizes(num_classes=num_classes)
        super().__init__(
            num_features,
            num_classes,
            bias=False,
            init_std=init_std,
            eps=eps,
            momentum=momentum,
            track_running_stats=track_running_stats,
            activation=activation,
            negative_slope=negative_slope,
            upsample=upsample,
            device=device,
            dtype=dtype,
        )

    def forward(
        self,
        x: Float[Tensor, "batch channels height width"],
        y: Int[Tensor, "batch"] | Float[Tensor, "batch num_classes"],
    ) -> Float[Tensor, "batch channels new_height new_width"]:
        """Normalise ``x`` and modulate map n as class ``y[n]`` says.

        ``y`` is int64 ``(N,)``, or floating ``(N, K)``: weights of a mixture of classes, whose
        scales and shifts are averaged. That the weights sum to 1 is not checked.

        Raises:
            TypeError: if the dtype of ``x`` or ``y`` is another one.
            ValueError: if shapes do not fit, or a label lies outside 0..K-1 (on a GPU the device
                finds that).
        """
        return self._modulate(x, "y", y)

    def gamma_beta(
        self, y: Int[Tensor, "rows"] | Float[Tensor, "rows num_classes"]
    ) -> tuple[Float[Tensor, "rows channels"], Float[Tensor, "rows channels"]]:
        """Return scale and shift of the classes ``y``, in float32 or better."""
        gain, shift = of_classes(y, self.gain.weight.T, self.shift.weight.T)
        return self._read(gain, shift)


class SelfModulatedBatchNorm2d(ModulatedNorm2d):
    r"""Batch norm whose scale and shift are two-layer networks of the generator's own noise.

    .. math:: \gamma(z) = 1 + W_\gamma \max(0, Vz + b) + a_\gamma, \qquad
        \beta(z) = W_\beta \max(0, Vz + b) + a_\beta

    The paper prints no output bias and no 1: with small initial weights its layer would be dead.
    With labels, the noise is first turned into

    .. math:: z' = E(y) + z \odot E'(y) \;\text{(the paper)}, \qquad
        z' = z + E(y) + E'(y) \odot z \;\text{(the article)}

    which are the same functions, :math:`E'` shifted by one: with :math:`E' = 0` the article keeps
    the noise, and the paper loses it. Both start at :math:`z' = z` here. The parameters are
    ``hidden``, ``gain``, ``shift``, and ``embed_shift`` and ``embed_gain`` for :math:`E` and
    :math:`E'`.

    Args:
        num_features: channels C.
        z_dim: length of the noise vector.
        hidden: width H of the hidden layer.
        num_classes: number of classes, if labels modulate too.
        share_hidden: one hidden layer for scale and shift, as in the paper's code; false for a
            second one of its own for the shift, ``hidden_shift``, as in the article's.
        zero_init: start W (and E) at zero, so that the norm begins as the plain one; otherwise
            from a normal distribution of standard deviation 0.02.
        spectral: spectral norm of the linear layers; needs ``zero_init=False``.
        label_form: "paper" or "article", see above.
        eps, momentum, track_running_stats, activation, negative_slope, upsample, device, dtype: as
            in :class:`ModulatedNorm2d`.

    Raises:
        ValueError: as :class:`ModulatedNorm2d`, or for ``spectral`` with ``zero_init``.

    Source: article 6549; Chen et al. 2019 (arXiv 1810.01365).

    Example:
        >>> norm = SelfModulatedBatchNorm2d(64, z_dim=32, activation="relu", upsample=2)
        >>> norm(torch.randn(2, 64, 4, 4), torch.randn(2, 32)).shape
        torch.Size([2, 64, 8, 8])
        >>> sum(p.numel() for p in norm.parameters())  # zH + H + 2(HC + C)
        5280
    """

    def __init__(
        self,
        num_features: int,
        z_dim: int,
        *,
        hidden: int = 32,
        num_classes: int | None = None,
        share_hidden: bool = True,
        zero_init: bool = True,
        spectral: bool = False,
        label_form: str = "paper",
        eps: float | int = 1e-5,
        momentum: float | int | None = 0.1,
        track_running_stats: bool = True,
        activation: str | None = None,
        negative_slope: float | int = 0.2,
        upsample: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        require_sizes(z_dim=z_dim, hidden=hidden)
        require_one_of("label_form", label_form, LABEL_FORMS)
        if num_classes is not None:
            require_sizes(num_classes=num_classes)
        if spectral and zero_init:
            raise ValueError(
                "`spectral` divides the weights by their largest singular value, which is 0 with "
                "`zero_init`: set `zero_init=False`."
            )
        super().__init__(
            num_features,
            hidden,
            init_std=0.0 if zero_init else 0.02,
            eps=eps,
            momentum=momentum,
            track_running_stats=track_running_stats,
            activation=activation,
            negative_slope=negative_slope,
            upsample=upsample,
            device=device,
            dtype=dtype,
        )
        self.z_dim, self.num_classes, self.label_form = z_dim, num_classes, label_form
        options = {"device": device, "dtype": dtype}
        self.hidden = nn.Linear(z_dim, hidden, **options)
        self.hidden_shift = None if share_hidden else nn.Linear(z_dim, hidden, **options)
        if num_classes is not None:
            self.embed_shift = nn.Embedding(num_classes, z_dim, **options)
            self.embed_gain = nn.Embedding(num_classes, z_dim, **options)
            self._start_the_labels()
        if spectral:
            for layer in filter(None, (self.hidden, self.hidden_shift, self.gain, self.shift)):
                spectral_norm(layer)

    def forward(
        self,
        x: Float[Tensor, "batch channels height width"],
        z: Float[Tensor, "batch z_dim"],
        y: Int[Tensor, "batch"] | Float[Tensor, "batch num_classes"] | None = None,
    ) -> Float[Tensor, "batch channels new_height new_width"]:
        """Normalise ``x`` and modulate map n by the noise ``z[n]``, and its label ``y[n]``.

        ``y`` as in :class:`ConditionalBatchNorm2d`; it is given if and only if the norm has
        ``num_classes``.

        Raises:
            TypeError, ValueError: if dtype, batch or width of an argument do not fit, or ``y`` is
                missing or not wanted.
        """
        return self._modulate(x, "z", z, y)

    def gamma_beta(
        self,
        z: Float[Tensor, "rows z_dim"],
        y: Int[Tensor, "rows"] | Float[Tensor, "rows num_classes"] | None = None,
    ) -> tuple[Float[Tensor, "rows channels"], Float[Tensor, "rows channels"]]:
        """Return scale and shift under noise ``z`` and labels ``y``, in float32 or better."""
        z = self._with_label(condition_vector("z", z, self.hidden), y)
        for_gain = F.relu(self.hidden(z))
        for_shift = for_gain if self.hidden_shift is None else F.relu(self.hidden_shift(z))
        return self._read(self.gain(for_gain), self.shift(for_shift))

    def reset_parameters(self) -> None:
        """Start anew, the hidden layers and the embeddings of the labels too."""
        super().reset_parameters()
        if not hasattr(self, "hidden"):  # not yet: called on the way through the constructors
            return
        for layer in filter(None, (self.hidden, self.hidden_shift)):
            fresh = nn.Linear(layer.in_features, layer.out_features)
            with torch.no_grad():
                _stored_weight(layer).copy_(fresh.weight)
                layer.bias.copy_(fresh.bias)
        if self.num_classes is not None:
            self._start_the_labels()

    def _start_the_labels(self) -> None:
        neutral = 1.0 if self.label_form == "paper" else 0.0
        nn.init.normal_(self.embed_shift.weight, std=self.init_std)
        nn.init.normal_(self.embed_gain.weight, mean=neutral, std=self.init_std)

    def _with_label(self, z: Tensor, y: Tensor | None) -> Tensor:
        if self.num_classes is None:
            if y is not None:
                raise ValueError("`y` is given, but the norm was made without `num_classes`.")
            return z
        if y is None:
            raise ValueError(f"`y` is missing: the norm has {self.num_classes} classes.")
        gain, shift = of_classes(y, self.embed_gain.weight, self.embed_shift.weight)
        if len(gain) != len(z):
            raise ValueError(f"`y` must hold one label per row of `z`, {len(z)}; got {len(gain)}.")
        moved = shift + gain * z
        return moved if self.label_form == "paper" else z + moved


class AdaIN(ModulatedNorm2d):
    r"""Adaptive instance norm: each map is normalised by itself, and a style modulates it.

    .. math:: \mathrm{out}_n = \gamma(w_n) \frac{h_n - \mu(h_n)}{\sqrt{\sigma^2(h_n) + \epsilon}}
        + \beta(w_n)

    :class:`ModulatedNorm2d` with ``norm="instance"``: no running statistics, and the same in
    training and evaluation.

    Args:
        num_features: channels C.
        w_dim: length of the style vector.
        init_std, eps, activation, negative_slope, upsample, device, dtype: as in
            :class:`ModulatedNorm2d`.

    Raises:
        ValueError: as :class:`ModulatedNorm2d`.

    Source: article 6549; Huang & Belongie 2017 (arXiv 1703.06868), Karras et al. 2019
        (StyleGAN, arXiv 1812.04948).

    Example:
        >>> x, w = torch.randn(2, 8, 4, 4), torch.randn(2, 3)
        >>> torch.allclose(AdaIN(8, w_dim=3)(x, w), nn.InstanceNorm2d(8)(x), atol=1e-6)
        True
    """

    def __init__(
        self,
        num_features: int,
        w_dim: int,
        *,
        init_std: float | int = 0.0,
        eps: float | int = 1e-5,
        activation: str | None = None,
        negative_slope: float | int = 0.2,
        upsample: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        require_sizes(w_dim=w_dim)
        super().__init__(
            num_features,
            w_dim,
            norm="instance",
            init_std=init_std,
            eps=eps,
            activation=activation,
            negative_slope=negative_slope,
            upsample=upsample,
            device=device,
            dtype=dtype,
        )


class PixelNorm(nn.Module):
    """Divide each position by the root mean square of its channels: :func:`pixel_norm`.

    Args:
        eps: added to the mean square.

    Source: Karras et al. 2018 (arXiv 1710.10196).

    Example:
        >>> PixelNorm()(torch.full((1, 4, 1, 1), 5.0)).flatten().tolist()
        [1.0, 1.0, 1.0, 1.0]
    """

    def __init__(self, eps: float | int = 1e-8) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Float[Tensor, "batch channels *positions"]) -> Float[Tensor, "..."]:
        """Return a tensor of the shape and dtype of ``x``."""
        return pixel_norm(x, eps=self.eps)

    def extra_repr(self) -> str:
        """Name epsilon."""
        return f"eps={self.eps}"


class MinibatchStd(nn.Module):
    """Append how much the samples of a group differ, as channels: :func:`minibatch_std`.

    Args:
        group_size: samples per group; the largest divisor of the batch up to it is taken.
        num_channels: number of channels to append.
        eps: added to the variance.

    Source: Karras et al. 2018 (arXiv 1710.10196).

    Example:
        >>> MinibatchStd()(torch.randn(8, 16, 4, 4)).shape
        torch.Size([8, 17, 4, 4])
    """

    def __init__(self, group_size: int = 4, num_channels: int = 1, eps: float | int = 1e-8) -> None:
        super().__init__()
        require_sizes(group_size=group_size, num_channels=num_channels)
        self.group_size, self.num_channels, self.eps = group_size, num_channels, eps

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch more_channels height width"]:
        """Return ``x`` with ``num_channels`` channels more."""
        return minibatch_std(x, self.group_size, self.num_channels, self.eps)

    def extra_repr(self) -> str:
        """Name the sizes."""
        return f"group_size={self.group_size}, num_channels={self.num_channels}"


def _normalised(x: Tensor, norm: str, groups: int, eps: float) -> Tensor:
    if norm in ("layer", "group"):
        return F.group_norm(x, 1 if norm == "layer" else groups, eps=eps)
    if norm == "channel":
        return F.layer_norm(x.movedim(1, -1), x.shape[1:2], eps=eps).movedim(-1, 1)
    return pixel_norm(x, eps=eps) if norm == "pixel" else x


def _stored_weight(layer: nn.Linear) -> Tensor:
    if parametrize.is_parametrized(layer, "weight"):
        return layer.parametrizations.weight.original
    return layer.weight
