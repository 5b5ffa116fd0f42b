"""Training a generator against a discriminator, with an average of its weights and a way to resume.

Source: article 6549; Goodfellow et al. 2014; Mescheder et al. 2018 (arXiv 1801.04406) for R1; Brock
et al. 2019 (arXiv 1809.11096) for standing statistics.
"""

import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Shaped
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize
from torch.optim import Optimizer
from tqdm import tqdm

from cln_tutorial._files import write_atomically
from cln_tutorial.gan_architectures.batches import Batch, images_and_labels, require_count
from cln_tutorial.gan_architectures.losses import AdversarialLoss, loss_named, r1
from cln_tutorial.gan_architectures.norms import MinibatchStd
from cln_tutorial.weight_averaging import (
    ConstantDecay,
    ExponentialMovingAverage,
    TensorFlowWarmup,
    recompute_batchnorm_,
)

WHAT = "cln_tutorial.gan_architectures.GANTrainer"


@dataclass
class GANHistory:
    """What happened in each step: lists of equal length, one number per step.

    Attributes:
        d_loss: of the last discriminator step, without the penalty.
        g_loss: of the generator.
        r1: mean squared gradient, without its factor, of the first penalty of the step; NaN in a
            step without one.
        seconds: wall time of all steps together.
    """

    d_loss: list[float] = field(default_factory=list)
    g_loss: list[float] = field(default_factory=list)
    r1: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def __len__(self) -> int:
        return len(self.d_loss)


class GANTrainer:
    r"""Train a pair of networks, and keep an average of the generator's weights.

    A step is ``n_dis`` steps of the discriminator, each on a batch of its own,

    .. math:: L_D + \tfrac{\gamma}{2}\,\overline{\|\nabla_x D(x)\|^2},

    and one of the generator. Fakes get the labels of the real batch in a random order, and both
    networks see them. All calls of a step share one step of the power iteration of spectral norm.
    Real and fake images go through the discriminator in one call, except where samples of a batch
    look at each other (batch norm, :class:`.MinibatchStd`): there in two, so that fakes are judged
    among fakes. R1 assumes that they do not: with batch norm in ``discriminator`` its gradient has
    terms across samples.

    Args:
        generator: called ``generator(z)`` or ``generator(z, y)``, with an attribute ``z_dim``.
        discriminator: called ``discriminator(x)`` or ``discriminator(x, y)``; logits ``(N,)``.
        loss: an :class:`.AdversarialLoss` or its name, such as ``"hinge"``.
        r1_gamma: :math:`\gamma`; 0 is no penalty.
        r1_every: the penalty is taken in every so many steps of the discriminator, and multiplied
            by that number.
        n_dis: steps of the discriminator per step of the generator.
        ema_decay: of the average, per step of the generator.
        ema_warmup: begin with :math:`\min(d, (1+t)/(10+t))`.
        opt_g: of the generator's parameters; Adam with rate 1e-3 and betas (0, 0.9) if not given.
        opt_d: the same for the discriminator.
        amp_dtype: ``torch.bfloat16`` runs the networks under autocast. Penalty, sigma and losses
            stay in float32.
        seed: of all noise that the trainer draws; dropout draws from PyTorch's global generator.

    Attributes:
        step: steps so far.
        history: the :class:`.GANHistory` of all of them.
        average: the :class:`~cln_tutorial.weight_averaging.ExponentialMovingAverage` of weights and
            of running statistics.

    Raises:
        ValueError: for an unknown loss, a number out of range, another dtype of autocast, or an
            optimiser of other parameters.
        TypeError: for a generator without ``z_dim``, another kind of loss, or an optimiser with
            tensors as options, which :meth:`save` could not write.

    Source:
        Article 6549; Mescheder et al. 2018; Karras et al. 2020 (arXiv 1912.04958) for the lazy
        penalty.

    Example:
        >>> from cln_tutorial.gan_architectures.batches import ShuffledBatches
        >>> from cln_tutorial.gan_architectures.networks import DCGANGenerator, SNDCGANDiscriminator
        >>> G = DCGANGenerator(8, 1, z_dim=4, width=8, norm="selfmod")
        >>> D = SNDCGANDiscriminator(8, 1, width=8)
        >>> images = torch.rand(32, 1, 8, 8) * 2 - 1
        >>> trainer = GANTrainer(G, D, loss="hinge")
        >>> history = trainer.fit(ShuffledBatches(images, batch_size=16), 3, progress=False)
        >>> len(history), trainer.sample_sheet(5).shape
        (3, torch.Size([5, 1, 8, 8]))
    """

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        *,
        loss: str | AdversarialLoss,
        r1_gamma: float | int = 0.0,
        r1_every: int = 1,
        n_dis: int = 1,
        ema_decay: float | int = 0.999,
        ema_warmup: bool = True,
        opt_g: Optimizer | None = None,
        opt_d: Optimizer | None = None,
        amp_dtype: torch.dtype | None = None,
        seed: int = 0,
    ):
        _require_noise_width(generator)
        if not (math.isfinite(r1_gamma) and r1_gamma >= 0):
            raise ValueError(f"`r1_gamma` must be at least 0; got {r1_gamma}.")
        require_count("r1_every", r1_every)
        require_count("n_dis", n_dis)
        require_count("seed", seed, 0)
        if not 0 <= ema_decay < 1:
            raise ValueError(f"`ema_decay` must lie in [0, 1); got {ema_decay}.")
        if amp_dtype not in (None, torch.bfloat16):
            raise ValueError(f"`amp_dtype` must be None or torch.bfloat16; got {amp_dtype}.")
        self.generator, self.discriminator = generator, discriminator
        self.loss = loss_named(loss) if isinstance(loss, str) else loss
        if not isinstance(self.loss, AdversarialLoss):
            raise TypeError(f"`loss` must be an AdversarialLoss or its name; got {loss!r}.")
        self.r1_gamma, self.r1_every, self.n_dis = r1_gamma, r1_every, n_dis
        self.amp_dtype, self.seed = amp_dtype, seed
        self.opt_g = _optimiser_of("opt_g", opt_g, generator)
        self.opt_d = _optimiser_of("opt_d", opt_d, discriminator)
        self.device = next(generator.parameters()).device
        self.average = ExponentialMovingAverage(
            generator,
            profile=(TensorFlowWarmup if ema_warmup else ConstantDecay)(ema_decay),
            bias_correction=False,
            buffers="average",
            # A mean of unit vectors is none, and sigma = u W v would be too small.
            exclude=lambda name: name.endswith(("._u", "._v")),
        )
        self.step = 0
        self.history = GANHistory()
        self._noise = torch.Generator(self.device).manual_seed(seed)
        self._within_step = False
        # Where samples of a batch look at each other, real and fake ones must not meet.
        self._apart = any(map(_compares_samples, discriminator.modules()))

    def fit(
        self,
        loader: Callable[[int], Batch] | Iterable[Any],
        steps: int,
        *,
        callback: Callable[["GANTrainer"], None] | None = None,
        progress: bool = True,
    ) -> GANHistory:
        """Train until there are ``steps`` steps **in all**, those of earlier calls included.

        A run that was killed goes on with the same call after :meth:`load`. All layers of both
        networks are in ``train()`` meanwhile, those in ``eval()`` too; then modes are put back.

        Args:
            loader: gives the batch of a number, counted from 0, as :class:`.ShuffledBatches` does:
                then a resumed run repeats its bits. Or an iterable of batches, which each call
                reads from its beginning, again and again: its place and order are its own. A batch
                is a tensor of images, alone or in a tuple, or a pair of images and int64 labels.
            steps: number of steps.
            callback: called with the trainer after each step: the place for :meth:`save` and
                :meth:`sample_sheet`.
            progress: show a bar.

        Returns:
            The history of all steps so far.

        Raises:
            FloatingPointError: for a loss that is not finite. Its step is not taken.
            TypeError: for images that are not floating, labels that are not int64, another kind of
                batch, or a tensor as the loader.
            ValueError: for ``steps`` below 1, labels of another number, or a loader that ends.
        """
        require_count("steps", steps)
        if isinstance(loader, Tensor):
            raise TypeError("`loader` must give batches; write `ShuffledBatches(images, ...)`.")
        batches = self._batches(loader)
        start, before = time.monotonic(), self.history.seconds
        bar = tqdm(total=steps, initial=self.step, unit=" steps", disable=not progress)
        with bar, _in_mode(True, self.generator, self.discriminator), torch.enable_grad():
            while self.step < steps:
                self._train(batches)
                self.history.seconds = before + time.monotonic() - start
                bar.update()
                if progress and self.step % 50 == 0:
                    shown = {"D": self.history.d_loss[-1], "G": self.history.g_loss[-1]}
                    bar.set_postfix({k: f"{v:.3g}" for k, v in shown.items()}, refresh=False)
                if callback is not None:
                    callback(self)
        return self.history

    def averaged_generator(self) -> nn.Module:
        """Return a copy of the generator with the averaged weights and statistics, in ``eval()``.

        The statistics are averages too, not those of the raw weights. They still lag:
        :func:`.recalibrate_batch_norm` makes those of this generator.
        """
        return self.average.averaged_model().eval()

    def sample_sheet(
        self, n: int = 64, y: Shaped[Tensor, "n"] | None = None, *, averaged: bool = True
    ) -> Float[Tensor, "n ..."]:
        """Return images of the same noise at each call, to watch a training.

        Args:
            n: how many; the first ones do not depend on it.
            y: labels, for a conditional generator.
            averaged: of the average, or of the raw weights.

        Returns:
            Images in [-1, 1], ``(n, channels, size, size)``, of the generator in ``eval()``.
        """
        require_count("n", n)
        noise = torch.Generator(self.device).manual_seed(self.seed + 1)
        # One row after the other, so that more images leave the first ones as they are.
        z = torch.cat([_noise_of(self.generator, 1, noise) for _ in range(n)])
        weights = self.average.applied() if averaged else nullcontext()
        with torch.no_grad(), weights, _in_mode(False, self.generator):
            return self.generator(z) if y is None else self.generator(z, y.to(self.device))

    # --- files ------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all that a run needs to go on with the same bits, to one safetensors file.

        Both networks with their buffers (statistics, vectors of spectral norm), both optimisers,
        the average, the noise, the history and the step. The file is replaced as a whole. Not in
        it: the global generator, which dropout draws from, and schedulers of learning rates.

        Raises:
            RuntimeError: after a step that did not end, as at an interrupt: the discriminator may
                be a step ahead. Save from the callback.
        """
        if self._within_step:
            raise RuntimeError(
                f"step {self.step + 1} was broken off halfway: `load` the last file, and save from "
                f"the callback of `fit`."
            )
        optimisers = {"opt_g": self.opt_g.state_dict(), "opt_d": self.opt_d.state_dict()}
        average, history = self.average.state_dict(), self.history
        tensors = {
            "noise": self._noise.get_state(),
            "history": torch.tensor(
                [history.d_loss, history.g_loss, history.r1], dtype=torch.float64
            ),
        }
        tensors |= {f"average/{name}": value for name, value in average["tensors"].items()}
        for part, network in self._networks().items():
            tensors |= {f"{part}/{name}": value for name, value in network.state_dict().items()}
        for part, state in optimisers.items():
            for number, entries in state["state"].items():
                tensors |= {
                    f"{part}/{number}/{name}": torch.as_tensor(value)
                    for name, value in entries.items()
                    if value is not None  # SGD without momentum
                }
        about = {
            "what": WHAT,
            "step": self.step,
            "seconds": self.history.seconds,
            "settings": self._settings(),
            "average": average["about"],
            "groups": {part: state["param_groups"] for part, state in optimisers.items()},
        }
        # Cloned, because safetensors refuses tied weights.
        plain = {
            name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, value in tensors.items()
        }
        write_atomically(path, save(plain, {"about": json.dumps(about)}))

    def load(self, path: str | os.PathLike[str]) -> None:
        """Take up what :meth:`save` has written, into a trainer that was made in the same way.

        The options of the optimisers, such as the rate, are then those of the file.

        Raises:
            ValueError: for a file of something else or cut off, or of another training: other
                settings, parameters, shapes or dtypes. Then nothing has changed.
        """
        about, tensors = _read(path)
        parts: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            part, _, name = key.partition("/")
            parts.setdefault(part, {})[name] = value
        for part, network in self._networks().items():
            there, here = _kinds(parts[part]), _kinds(network.state_dict())
            if there != here:
                name = next(n for n in [*there, *here] if there.get(n) != here.get(n))
                raise ValueError(
                    f"{path} is of another {part}: {name} is {there.get(name)} there, "
                    f"{here.get(name)} here."
                )
        if about["settings"] != self._settings():
            raise ValueError(
                f"{path} is of a training with {about['settings']}; here are {self._settings()}."
            )
        for part, network in self._networks().items():
            network.load_state_dict(parts[part])
        for part, optimiser in (("opt_g", self.opt_g), ("opt_d", self.opt_d)):
            state: dict[int, dict[str, Tensor]] = {}
            for key, value in parts.get(part, {}).items():
                number, _, name = key.partition("/")
                state.setdefault(int(number), {})[name] = value
            optimiser.load_state_dict({"state": state, "param_groups": about["groups"][part]})
        self.average.load_state_dict({"about": about["average"], "tensors": parts["average"]})
        self._noise.set_state(tensors["noise"])
        self.history = GANHistory(*tensors["history"].tolist(), about["seconds"])
        self.step, self._within_step = about["step"], False

    # --- inside -----------------------------------------------------------------------------------

    def _train(self, batches: Iterator[Batch]) -> None:
        penalties = []
        for number in range(self.step * self.n_dis, (self.step + 1) * self.n_dis):
            x, y = self._next(batches)
            self._within_step = True
            d_loss, penalty = self._train_discriminator(x, y, number)
            penalties.append(penalty)
        g_loss = self._train_generator(x, y)
        self.average.update()
        self.step += 1
        self.history.d_loss.append(d_loss)
        self.history.g_loss.append(g_loss)
        self.history.r1.append(next((each for each in penalties if each == each), math.nan))
        self._within_step = False

    def _train_discriminator(self, x: Tensor, y: Tensor | None, number: int) -> tuple[float, float]:
        with torch.no_grad():
            fake, y_fake = self._fakes(len(x), y)
        penalty = None
        with _one_sigma(self.discriminator):
            if self.r1_gamma and number % self.r1_every == 0:
                penalty = r1(self.discriminator, x, y)
            with self._autocast():
                real_logits, fake_logits = self._logits(x, y, fake, y_fake)
            loss = self.loss.d_loss(real_logits, fake_logits)
            total = loss
            if penalty is not None:
                total = loss + self.r1_gamma / 2 * self.r1_every * penalty
            self._descend("discriminator", self.opt_d, total)
        return loss.item(), math.nan if penalty is None else penalty.item()

    def _train_generator(self, x: Tensor, y: Tensor | None) -> float:
        with _frozen(self.discriminator):
            fake, y_fake = self._fakes(len(x), y)
            with _one_sigma(self.discriminator):
                with self._autocast():
                    if self.loss.needs_real:
                        real_logits, fake_logits = self._logits(x, y, fake, y_fake)
                    else:
                        real_logits, fake_logits = None, self._judge(fake, y_fake)
                loss = self.loss.g_loss(fake_logits, real_logits)
                self._descend("generator", self.opt_g, loss)
        return loss.item()

    def _fakes(self, n: int, y: Tensor | None) -> tuple[Tensor, Tensor | None]:
        z = _noise_of(self.generator, n, self._noise)
        with _one_sigma(self.generator), self._autocast():
            if y is None:
                return self.generator(z), None
            y = y[torch.randperm(n, generator=self._noise, device=self.device)]
            return self.generator(z, y), y

    def _logits(
        self, x: Tensor, y: Tensor | None, fake: Tensor, y_fake: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if self._apart:
            return self._judge(x, y), self._judge(fake, y_fake)
        both = None if y is None else torch.cat([y, y_fake])
        return self._judge(torch.cat([x, fake]), both).chunk(2)

    def _judge(self, x: Tensor, y: Tensor | None) -> Tensor:
        x = x.clone()  # which a discriminator may change in place
        return self.discriminator(x) if y is None else self.discriminator(x, y)

    def _autocast(self) -> AbstractContextManager[Any]:
        on = self.amp_dtype is not None
        return torch.autocast(self.device.type, self.amp_dtype or torch.bfloat16, enabled=on)

    def _descend(self, whose: str, optimiser: Optimizer, loss: Tensor) -> None:
        if not math.isfinite(value := loss.item()):
            before = "there was no step before"
            if self.step:
                d_loss, g_loss = self.history.d_loss[-1], self.history.g_loss[-1]
                before = f"the step before had d_loss {d_loss:.4g} and g_loss {g_loss:.4g}"
            raise FloatingPointError(
                f"the training diverges at step {self.step + 1}: the {self.loss.name} loss of the "
                f"{whose} is {value}; {before}."
            )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    def _batches(self, loader: Callable[[int], Batch] | Iterable[Any]) -> Iterator[Batch]:
        if callable(loader):
            yield from map(loader, itertools.count(self.step * self.n_dis))
        ended = False
        while not ended:
            ended = True
            for batch in loader:
                ended = False
                yield batch

    def _next(self, batches: Iterator[Batch]) -> tuple[Tensor, Tensor | None]:
        batch = next(batches, None)
        if batch is None:
            raise ValueError(f"`loader` has no batch for step {self.step + 1}: it ended.")
        x, y = images_and_labels(batch)
        return x.to(self.device), None if y is None else y.to(self.device)

    def _networks(self) -> dict[str, nn.Module]:
        return {"generator": self.generator, "discriminator": self.discriminator}

    def _settings(self) -> dict[str, Any]:
        return {
            "loss": self.loss.name,
            "optimisers": [
                [type(each).__name__, *(len(group["params"]) for group in each.param_groups)]
                for each in (self.opt_g, self.opt_d)
            ],
            "average": repr(self.average.profiles),
            "r1_gamma": self.r1_gamma,
            "r1_every": self.r1_every,
            "n_dis": self.n_dis,
            "amp_dtype": str(self.amp_dtype),
            "seed": self.seed,
        }


def recalibrate_batch_norm(
    G: nn.Module,
    n_batches: int,
    batch_size: int,
    *,
    y_sampler: Callable[[int], Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> nn.Module:
    r"""Set the running statistics of a generator to those of its own samples, in place.

    Over all :math:`n` samples of all batches together, each with the same weight,

    .. math:: \mu = \frac1n\sum_i h_i, \qquad \sigma^2 = \frac1{n-1}\sum_i (h_i-\mu)^2

    per channel: not a moving average with a momentum. Averaged weights have seen no batch, so they
    need it; BigGAN calls the result standing statistics. See
    :func:`~cln_tutorial.weight_averaging.recompute_batchnorm_`, which does the work.

    Args:
        G: a generator with an attribute ``z_dim``. Modes stay as they are.
        n_batches: how many batches of noise.
        batch_size: samples per batch. Deeper layers see what the batch's own statistics make of the
            layers before, so large batches are better than many.
        y_sampler: for a conditional generator: gives so many labels, with the shares that sampling
            will have, because the statistics depend on them.
        generator: of the noise, on the device of ``G``; the global one if not given.

    Returns:
        ``G``.

    Raises:
        TypeError: for a generator without ``z_dim``.
        ValueError: for counts below 1.

    Source:
        Brock et al. 2019, arXiv 1809.11096, appendix B (standing statistics).

    Example:
        >>> from cln_tutorial.gan_architectures.networks import DCGANGenerator
        >>> G = DCGANGenerator(8, 1, z_dim=4, width=8).eval()
        >>> recalibrate_batch_norm(G, 2, 32) is G
        True
    """
    _require_noise_width(G)
    require_count("n_batches", n_batches)
    require_count("batch_size", batch_size)

    def run(G: nn.Module, z: Tensor) -> None:
        G(z) if y_sampler is None else G(z, y_sampler(len(z)).to(z.device))

    batches = (_noise_of(G, batch_size, generator) for _ in range(n_batches))
    return recompute_batchnorm_(G, batches, forward=run)


def _compares_samples(layer: nn.Module) -> bool:
    if isinstance(layer, _BatchNorm):  # the modulated norms are, whatever they normalise over
        return getattr(layer, "norm", "batch") == "batch"
    return isinstance(layer, MinibatchStd)


def _noise_of(G: nn.Module, n: int, generator: torch.Generator | None) -> Tensor:
    like = next(G.parameters())
    return torch.randn(n, G.z_dim, generator=generator, device=like.device, dtype=like.dtype)


@contextmanager
def _one_sigma(network: nn.Module) -> Iterator[None]:
    """Inside, a weight under spectral norm is computed once, outside of autocast.

    Each access would take a step of the power iteration: two calls would see two sigmas. On a GPU
    autocast would round their products of matrix and vector.
    """
    with parametrize.cached():
        for module in network.modules():
            if parametrize.is_parametrized(module):
                for name in module.parametrizations:
                    getattr(module, name)
        yield


@contextmanager
def _frozen(network: nn.Module) -> Iterator[None]:
    """Gradients pass through, and none stays in the parameters."""
    before = [(p, p.requires_grad) for p in network.parameters()]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, needed in before:
            parameter.requires_grad_(needed)


@contextmanager
def _in_mode(training: bool, *networks: nn.Module) -> Iterator[None]:
    before = [(module, module.training) for network in networks for module in network.modules()]
    try:
        for network in networks:
            network.train(training)
        yield
    finally:
        for module, mode in before:
            module.training = mode


def _optimiser_of(name: str, optimiser: Optimizer | None, network: nn.Module) -> Optimizer:
    if optimiser is None:
        return torch.optim.Adam(network.parameters(), lr=1e-3, betas=(0.0, 0.9))
    held = {id(p) for group in optimiser.param_groups for p in group["params"]}
    if not held <= {id(p) for p in network.parameters()}:
        raise ValueError(f"`{name}` has parameters that are not those of its network.")
    try:
        json.dumps(optimiser.state_dict()["param_groups"])
    except TypeError as error:
        raise TypeError(f"`{name}` must have plain numbers as options, to be saved.") from error
    return optimiser


def _kinds(tensors: dict[str, Tensor]) -> dict[str, str]:
    return {name: f"{tuple(each.shape)} {each.dtype}" for name, each in tensors.items()}


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("about", "{}"))
            # Cloned, because a slice of the file need not be aligned as a fresh tensor is, and
            # alignment can change the last bit of a sum.
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 - no dict
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file, or cut off: {error}.") from error
    if not isinstance(about, dict) or about.get("what") != WHAT:
        raise ValueError(f"{path} was not written by `GANTrainer.save`.")
    return about, tensors


def _require_noise_width(G: nn.Module) -> None:
    if not isinstance(getattr(G, "z_dim", None), int):
        raise TypeError(
            f"a generator must say the width of its noise as `z_dim`; {type(G).__name__} does not."
        )
