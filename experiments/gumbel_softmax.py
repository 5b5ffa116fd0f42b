"""Which gradient estimator trains a discrete autoencoder best, where every bound can be summed.

scikit-learn's digits, each pixel above 7 of 16 a one, behind two latent variables of 16 classes: of
256 states ELBO, log-likelihood and the encoder's gradient are exact sums. The same network is
trained with each estimator and with the exact gradient; beside the exact ELBO of the held-out
images stand the exact log-likelihood, the bound of 100 samples, and the number of relaxed samples
that is often called an ELBO.

Nothing was searched: sizes, rate and steps are those of the specification, written before the first
run, and the temperatures are those that papers and the article name.
"""

import copy
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from cln_tutorial.gumbel_softmax.discrete_vae import CategoricalVAE
from cln_tutorial.gumbel_softmax.estimators import (
    RLOO,
    ZGR,
    Exact,
    GumbelRao,
    GumbelSoftmax,
    Rebar,
    Reinforce,
    STGumbelSoftmax,
    StraightThrough,
)
from experiments import harness


class Annealed(GumbelSoftmax):
    """The temperature of the article's example, 0.01 + 0.99 * 0.999 ** step."""

    def __init__(self) -> None:
        super().__init__(1.0)
        self.step = 0

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        self.tau = 0.01 + 0.99 * 0.999**self.step
        self.step += 1
        return super().__call__(*arguments, **keywords)


EXACT = "exact gradient"
ESTIMATORS: dict[str, Callable[[], Any]] = {
    EXACT: Exact,
    "score function": Reinforce,
    "score function, running mean": lambda: Reinforce("ema"),
    "RLOO of 2": lambda: RLOO(2),
    "RLOO of 4": lambda: RLOO(4),
    "REBAR": Rebar,
    "straight through": StraightThrough,
    "ZGR": ZGR,
    "relaxed at 1": lambda: GumbelSoftmax(1.0),
    "relaxed at 1/2": lambda: GumbelSoftmax(0.5),
    "relaxed, annealed": Annealed,
    "straight through, relaxed at 1/2": lambda: STGumbelSoftmax(0.5),
    "Rao Blackwell of 10 at 1/2": lambda: GumbelRao(0.5, 10),
}
MOMENTS = ("start", "middle", "end")


@dataclass(frozen=True)
class Settings:
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    variants: tuple[str, ...] = tuple(ESTIMATORS)
    n_latent: int = 2
    n_class: int = 16
    hidden: int = 64
    steps: int = 1500
    batch: int = 64
    rate: float = 3e-3
    train: int = 1500  # images; the others are held out
    gradients: int = 100  # of one batch, per moment
    samples: int = 100  # of the tighter bound
    tau: float = 1.0  # of the relaxed number, where training has none


QUICK = Settings(seeds=(0, 1, 2), n_class=4, hidden=8, steps=6, gradients=3, samples=4)

_NATS = "nats per held-out image"
_UNITS = {
    "ELBO": _NATS,
    "log likelihood": _NATS,
    "100 samples": f"{_NATS}, the bound of 100 samples",
    "relaxed": f"{_NATS}, no bound",
}
_GRADIENT = {
    "cosine": "cosine of the mean of 100 gradients of the encoder with the exact gradient",
    "variance": "variance of one gradient of the encoder over the square of the exact one",
}


def units(settings: Settings) -> dict[str, str]:
    """The unit of each figure, named "group-row.column": the book shows a group as a table."""
    found: dict[str, str] = {}
    for row in settings.variants:
        found |= {f"held out-{row}.{column}": unit for column, unit in _UNITS.items()}
        for moment in MOMENTS if row != EXACT else ():
            for column, unit in _GRADIENT.items():
                found[f"gradient-{row}.{column}, {moment}"] = unit
    return found


PUBLISHED = [
    {
        "figure": f"held out-{row}.ELBO",
        "value": -value,
        "source": "Jang, Gu & Poole 2017, table 1, VAE with categorical variables",
        "comparable": False,
        "why": "negative log-likelihoods of MNIST with 20 variables of 10 classes, estimated with "
        "1,000 samples; here 8 x 8 digits, 2 variables of 16 classes, and the exact ELBO",
    }
    for row, value in {
        "score function, running mean": 110.6,
        "straight through": 110.9,
        "relaxed at 1": 101.5,
        "straight through, relaxed at 1/2": 107.8,
    }.items()
]


def work(job: harness.Job) -> dict[str, Any]:
    """The figures of one job. It takes seconds, so that one that is killed begins anew."""
    settings, row = job.settings, job.variant
    train, held_out = (side.to(job.device) for side in images(settings))
    torch.manual_seed(job.seed)
    model = CategoricalVAE(train.shape[1], settings.n_latent, settings.n_class, settings.hidden).to(
        job.device
    )
    estimator = ESTIMATORS[row]()
    optimiser = torch.optim.Adam(model.parameters(), lr=settings.rate)
    generator = torch.Generator(job.device).manual_seed(job.seed)
    figures: dict[str, float] = {}
    for step in range(settings.steps + 1):
        moment = {0: "start", settings.steps // 2: "middle", settings.steps: "end"}.get(step)
        if moment and row != EXACT:
            found = encoder_gradients(model, estimator, train[: settings.batch], settings)
            for column, value in found.items():
                figures[f"gradient-{row}.{column}, {moment}"] = value
        if step < settings.steps:
            order = batch_of(job.seed, step, settings)
            model.fit([train[order]], estimator, optimiser, generator=generator)
    tau = getattr(estimator, "tau", settings.tau)
    generator.manual_seed(job.seed)
    numbers = {
        "ELBO": model.exact_elbo(held_out),
        "log likelihood": model.exact_log_prob(held_out),
        "100 samples": model.iwae_bound(held_out, settings.samples, generator=generator),
        "relaxed": model.relaxed_elbo(held_out, tau, settings.samples, generator=generator),
    }
    for column, each in numbers.items():
        figures[f"held out-{row}.{column}"] = each.double().mean().item()
    return figures


def encoder_gradients(
    model: CategoricalVAE, estimator: Any, x: Tensor, settings: Settings
) -> dict[str, float]:
    """Compare gradients of the encoder on one batch with the exact one; nothing learns from it."""
    parameters = list(model.encoder.parameters())
    generator = torch.Generator(x.device).manual_seed(6705)

    def gradient(way: Any) -> Tensor:
        loss = model.loss(x, way, generator=generator).mean()
        parts = torch.autograd.grad(loss, parameters)
        return torch.cat([part.flatten() for part in parts]).double()

    exact = gradient(Exact())
    copied = copy.deepcopy(estimator)
    found = torch.stack([gradient(copied) for _ in range(settings.gradients)])
    variance = found.var(0).sum() / exact.square().sum()
    cosine = torch.nn.functional.cosine_similarity(found.mean(0), exact, dim=0)
    return {"cosine": cosine.item(), "variance": variance.item()}


@lru_cache(maxsize=1)
def images(settings: Settings) -> tuple[Tensor, Tensor]:
    """The digits in black and white, one split for all seeds."""
    pixels = load_digits().data
    order = np.random.default_rng(0).permutation(len(pixels))
    binary = torch.from_numpy((pixels[order] > 7).astype(np.float32))
    return binary[: settings.train], binary[settings.train :]


def batch_of(seed: int, step: int, settings: Settings) -> Tensor:
    """The images of one step."""
    generator = np.random.default_rng([seed, step])
    return torch.from_numpy(generator.choice(settings.train, settings.batch, replace=False))


def checksums(settings: Settings) -> dict[str, dict[str, str]]:
    content = torch.cat(images(settings)).numpy().astype(np.uint8).tobytes()
    return {"digits": {"images": hashlib.sha256(content).hexdigest()}}


EXPERIMENT = harness.Experiment(
    name="gumbel_softmax",
    settings=Settings(),
    quick=QUICK,
    work=work,
    checksums=checksums,
    units=units,
    published=PUBLISHED,
)

if __name__ == "__main__":
    harness.main(EXPERIMENT)
