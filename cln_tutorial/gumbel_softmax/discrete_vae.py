r"""A variational autoencoder whose latent variables are classes, with all bounds told apart.

.. math:: \log p(x) \ge \mathbb E_{q(z|x)} \log p(x|z) - \mathrm{KL}(q(z|x) \,\|\, p(z))

Source: Su Jianlin, article 6705 (https://kexue.fm/archives/6705), 2019, its example; Jang, Gu &
Poole 2017; Burda, Grosse & Salakhutdinov 2016 for the bound of several samples.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cln_tutorial.gumbel_softmax._checks import checks_values
from cln_tutorial.gumbel_softmax.relaxation import gumbel_softmax, one_hot
from cln_tutorial.gumbel_softmax.sampling import gumbel_max_sample

MOST_STATES = 2**16  # that are summed over


class CategoricalVAE(nn.Module):
    r"""``n_latent`` classes of ``n_class`` behind a binary vector; encoder and decoder are MLPs.

    Args:
        in_dim: :math:`D`, entries of :math:`x`.
        n_latent: :math:`N`, latent variables.
        n_class: :math:`K`, classes of each.
        hidden: width of the one hidden layer of encoder and decoder.
        prior: "uniform" :math:`1/K`, or "learned".

    Raises:
        ValueError: for another prior, or sizes below one.

    Source:
        Jang, Gu & Poole 2017, section 4.2.

    Example:
        >>> vae = CategoricalVAE(in_dim=6, n_latent=2, n_class=3, hidden=8)
        >>> x = torch.ones(4, 6)
        >>> bool((vae.exact_log_prob(x) >= vae.exact_elbo(x)).all())
        True
    """

    def __init__(
        self, in_dim: int, n_latent: int, n_class: int, hidden: int, prior: str = "uniform"
    ) -> None:
        super().__init__()
        sizes = {"in_dim": in_dim, "n_latent": n_latent, "n_class": n_class, "hidden": hidden}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"`{name}` must be at least 1; got {size}.")
        if prior not in ("uniform", "learned"):
            raise ValueError(f"`prior` must be 'uniform' or 'learned'; got {prior!r}.")
        self.in_dim, self.n_latent, self.n_class = in_dim, n_latent, n_class
        latent = n_latent * n_class
        self.encoder = nn.Sequential(
            nn.Linear(in_dim, hidden), nn.ReLU(), nn.Linear(hidden, latent)
        )
        self.decoder = nn.Sequential(
            nn.Linear(latent, hidden), nn.ReLU(), nn.Linear(hidden, in_dim)
        )
        logits = torch.zeros(n_latent, n_class)
        if prior == "learned":
            self.prior_logits = nn.Parameter(logits)
        else:
            self.register_buffer("prior_logits", logits)

    # --- the parts --------------------------------------------------------------------------------

    def encode(self, x: Float[Tensor, "batch in_dim"]) -> Float[Tensor, "batch n_latent n_class"]:
        r"""Return the logits of :math:`q(z|x)`."""
        self._require(x)
        return self.encoder(x).unflatten(-1, (self.n_latent, self.n_class))

    def log_likelihood(
        self,
        x: Float[Tensor, "batch in_dim"],
        z: Float[Tensor, "samples #batch n_latent n_class"],
    ) -> Float[Tensor, "samples batch"]:
        r"""Return :math:`\log p(x|z)` for vertices, or for relaxed samples in their place."""
        logits = self.decoder(z.flatten(-2))
        return F.logsigmoid(torch.where(x.bool(), logits, -logits)).sum(-1)

    def kl(self, logits: Float[Tensor, "batch n_latent n_class"]) -> Float[Tensor, "batch"]:
        r"""Return :math:`\mathrm{KL}(q(z|x) \| p(z))`, as a sum over the classes.

        For the uniform prior it is :math:`N \log K` less the entropy of :math:`q`; the example of
        the article leaves out :math:`N \log K`, which no gradient sees.
        """
        log_q, log_p = logits.log_softmax(-1), self.prior_logits.log_softmax(-1)
        return (log_q.exp() * (log_q - log_p)).sum((-2, -1))

    # --- training ---------------------------------------------------------------------------------

    def loss(
        self,
        x: Float[Tensor, "batch in_dim"],
        estimator: Any,
        *,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "batch"]:
        """Return what one minimises: the negative bound, with the gradient of an estimator.

        Args:
            x: entries 0 or 1.
            estimator: one of the ten, :class:`ZGR` for example.
            generator: of its samples.
        """
        logits = self.encode(x)
        estimate = estimator(logits, lambda z: -self.log_likelihood(x, z), generator=generator)
        return estimate.loss + self.kl(logits)

    # --- the bounds -------------------------------------------------------------------------------

    @torch.no_grad()
    def elbo(
        self,
        x: Float[Tensor, "batch in_dim"],
        n: int = 1,
        *,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "batch"]:
        """Return the bound of the model as it is, of classes: the mean over ``n`` draws of them."""
        logits = self.encode(x)
        z = self._draw(logits, n, generator)
        return self.log_likelihood(x, z).mean(0) - self.kl(logits)

    @torch.no_grad()
    def relaxed_elbo(
        self,
        x: Float[Tensor, "batch in_dim"],
        tau: float | int,
        n: int = 1,
        *,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "batch"]:
        """Return what many call the bound: relaxed samples decoded, less the KL of the classes.

        It bounds nothing. The decoder sees vectors that the model of classes never gives it, and
        the two terms belong to different models.
        """
        logits = self.encode(x)
        z = gumbel_softmax(logits.expand(n, *logits.shape), tau, generator=generator)
        return self.log_likelihood(x, z).mean(0) - self.kl(logits)

    @torch.no_grad()
    def iwae_bound(
        self,
        x: Float[Tensor, "batch in_dim"],
        n: int,
        *,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "batch"]:
        r"""Return :math:`\log \frac1n \sum_k p(x, z_k) / q(z_k|x)`: tighter than the ELBO.

        Its mean grows with ``n`` towards :math:`\log p(x)`.
        """
        logits = self.encode(x)
        z = self._draw(logits, n, generator)
        log_ratio = self.prior_logits.log_softmax(-1) - logits.log_softmax(-1)
        weights = self.log_likelihood(x, z) + (z * log_ratio).sum((-2, -1))
        return weights.logsumexp(0) - math.log(n)

    @torch.no_grad()
    def exact_elbo(self, x: Float[Tensor, "batch in_dim"]) -> Float[Tensor, "batch"]:
        """Return the bound, summed over all states."""
        logits, states = self.encode(x), self.states()
        q = (states * logits.log_softmax(-1)).sum((-2, -1)).exp()
        return (q * self.log_likelihood(x, states)).sum(0) - self.kl(logits)

    @torch.no_grad()
    def exact_log_prob(self, x: Float[Tensor, "batch in_dim"]) -> Float[Tensor, "batch"]:
        r"""Return :math:`\log p(x)`, summed over all states.

        Raises:
            ValueError: for more than 65,536 states.
        """
        self._require(x)
        states = self.states()
        prior = (states * self.prior_logits.log_softmax(-1)).sum((-2, -1))
        return (prior + self.log_likelihood(x, states)).logsumexp(0)

    def states(self) -> Float[Tensor, "states 1 n_latent n_class"]:
        """Return all states as vertices, the last latent variable changing fastest."""
        count = self.n_class**self.n_latent
        if count > MOST_STATES:
            raise ValueError(
                f"{self.n_class} ** {self.n_latent} states are too many to sum over, more than "
                f"{MOST_STATES:,}; use `elbo` and `iwae_bound`."
            )
        each = torch.arange(self.n_class, device=self.prior_logits.device)
        index = torch.cartesian_prod(*[each] * self.n_latent).view(count, 1, self.n_latent)
        return one_hot(index, self.prior_logits)

    # --- samples ----------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self, n: int, *, generator: torch.Generator | None = None
    ) -> Float[Tensor, "n in_dim"]:
        """Draw ``n`` vectors of 0 and 1 from the model."""
        z = self._draw(self.prior_logits, n, generator)
        chance = self.decoder(z.flatten(-2)).sigmoid()
        return torch.bernoulli(chance, generator=generator)

    def fit(
        self,
        batches: Iterable[Tensor],
        estimator: Any,
        optimiser: torch.optim.Optimizer,
        *,
        generator: torch.Generator | None = None,
    ) -> list[float]:
        """Take one step per batch; return the mean loss of each."""
        losses = []
        for x in batches:
            optimiser.zero_grad()
            loss = self.loss(x, estimator, generator=generator).mean()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        return losses

    def _draw(self, logits: Tensor, n: int, generator: torch.Generator | None) -> Tensor:
        index = gumbel_max_sample(logits, (n,), generator=generator)
        return one_hot(index, logits)

    def _require(self, x: Tensor) -> None:
        if x.ndim != 2 or x.shape[-1] != self.in_dim:
            raise ValueError(f"`x` must be (batch, {self.in_dim}); got {tuple(x.shape)}.")
        if checks_values(None, x) and not ((x == 0) | (x == 1)).all():
            raise ValueError("`x` must be 0 or 1 everywhere; binarise it first.")
