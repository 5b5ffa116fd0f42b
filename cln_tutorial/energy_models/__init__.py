r"""Energy models: sample them with Langevin dynamics, train them, and measure both honestly.

.. math:: p(x) = \frac{e^{-E(x)/T}}{Z}, \qquad x' = x - h\,\nabla E(x) + \sqrt{2hT}\,\xi, \qquad
    \nabla_\theta L = \mathbb{E}_{\text{data}}[\nabla_\theta E] - \mathbb{E}_p[\nabla_\theta E]

Source: Su Jianlin, article 6612 (https://kexue.fm/archives/6612), 2019, after 6316 and 6331;
Du & Mordatch 2019; Nijkamp, Hill, Han, Zhu & Wu 2019; Vincent 2011; Neal 2001.
"""

from cln_tutorial.energy_models._chains import SampleInfo, SampleOutput
from cln_tutorial.energy_models._checks import DivergenceError
from cln_tutorial.energy_models.ais import AISOutput, ais_log_partition, ais_schedule
from cln_tutorial.energy_models.annealed import AnnealedLangevin, tweedie
from cln_tutorial.energy_models.boltzmann import RBMEnergy
from cln_tutorial.energy_models.buffer import ReplayBuffer
from cln_tutorial.energy_models.diagnostics import (
    autocorrelation,
    effective_sample_size,
    integrated_autocorr_time,
    rhat,
)
from cln_tutorial.energy_models.energies import (
    DoubleWellEnergy,
    GaussianEnergy,
    GaussianMixtureEnergy,
    GridEnergy2D,
)
from cln_tutorial.energy_models.losses import (
    CDOutput,
    contrastive_divergence_loss,
    denoising_score_matching_loss,
    gradient_penalty,
    sliced_score_matching_loss,
)
from cln_tutorial.energy_models.model import EnergyModel
from cln_tutorial.energy_models.philox import counter_normal, counter_uniform
from cln_tutorial.energy_models.samplers import (
    effective_temperature,
    langevin_sample,
    mala_sample,
    underdamped_langevin_sample,
)
from cln_tutorial.energy_models.steps import (
    Preconditioner,
    baoab_step,
    langevin_step,
    mala_log_ratio,
    mala_step,
)
from cln_tutorial.energy_models.trainer import DivergenceGuard, EnergyTrainer, History
from cln_tutorial.energy_models.two_sample import (
    energy_distance,
    knn_precision_recall,
    mmd,
    permutation_test,
)

__all__ = [
    "AISOutput",
    "AnnealedLangevin",
    "CDOutput",
    "DivergenceError",
    "DivergenceGuard",
    "DoubleWellEnergy",
    "EnergyModel",
    "EnergyTrainer",
    "GaussianEnergy",
    "GaussianMixtureEnergy",
    "GridEnergy2D",
    "History",
    "Preconditioner",
    "RBMEnergy",
    "ReplayBuffer",
    "SampleInfo",
    "SampleOutput",
    "ais_log_partition",
    "ais_schedule",
    "autocorrelation",
    "baoab_step",
    "contrastive_divergence_loss",
    "counter_normal",
    "counter_uniform",
    "denoising_score_matching_loss",
    "effective_sample_size",
    "effective_temperature",
    "energy_distance",
    "gradient_penalty",
    "integrated_autocorr_time",
    "knn_precision_recall",
    "langevin_sample",
    "langevin_step",
    "mala_log_ratio",
    "mala_sample",
    "mala_step",
    "mmd",
    "permutation_test",
    "rhat",
    "sliced_score_matching_loss",
    "tweedie",
    "underdamped_langevin_sample",
]
