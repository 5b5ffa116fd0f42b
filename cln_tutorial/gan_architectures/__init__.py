r"""From DCGAN to SELF-MOD: one family of modulated networks, how to judge and how to train them.

.. math:: \mathrm{out} = \gamma(c)\,N(h) + \beta(c)

Two choices make a family: what N takes its mean and variance over, and where the condition c comes
from.

Source: Su Jianlin, article 6549 (https://kexue.fm/archives/6549), 2019; Chen, Lucic, Houlsby &
Gelly 2019, On Self Modulation for Generative Adversarial Networks (arXiv 1810.01365).
"""

from cln_tutorial.gan_architectures.analysis import (
    dirac_gan,
    nyquist_energy,
    overlap_count,
    phase_response,
    receptive_field,
)
from cln_tutorial.gan_architectures.batches import ShuffledBatches
from cln_tutorial.gan_architectures.blocks import (
    FusedBatchNorm2d,
    ResBlockDown,
    ResBlockUp,
    SelfAttention2d,
    icnr_,
    upsampling_conv,
)
from cln_tutorial.gan_architectures.classifier import FeatureClassifier
from cln_tutorial.gan_architectures.foreign import fold_into_conv, load_foreign_state_dict
from cln_tutorial.gan_architectures.functional import (
    available_norm_backends,
    minibatch_std,
    modulated_batch_norm,
    modulated_instance_norm,
    pixel_norm,
)
from cln_tutorial.gan_architectures.losses import (
    AdversarialLoss,
    gradient_penalty,
    hinge,
    least_squares,
    loss_named,
    non_saturating,
    r1,
    r2,
    relativistic,
    relativistic_average,
    wasserstein,
)
from cln_tutorial.gan_architectures.metrics import (
    DensityCoverage,
    KernelDistance,
    ModeCoverage,
    PrecisionRecall,
    density_coverage,
    frechet_bias,
    frechet_distance,
    kernel_distance,
    mode_coverage,
    nearest_mode,
    precision_recall,
)
from cln_tutorial.gan_architectures.networks import (
    DCGANDiscriminator,
    DCGANGenerator,
    ModulatedGenerator,
    ProjectionDiscriminator,
    ResNetDiscriminator,
    ResNetGenerator,
    SNDCGANDiscriminator,
)
from cln_tutorial.gan_architectures.norms import (
    AdaIN,
    ConditionalBatchNorm2d,
    MinibatchStd,
    ModulatedNorm2d,
    PixelNorm,
    SelfModulatedBatchNorm2d,
)
from cln_tutorial.gan_architectures.spectral import (
    conv_operator_norm,
    lipschitz_bound,
    operator_norm_bounds,
    operator_spectral_norm,
)
from cln_tutorial.gan_architectures.training import (
    GANHistory,
    GANTrainer,
    recalibrate_batch_norm,
)

__all__ = [
    "AdaIN",
    "AdversarialLoss",
    "ConditionalBatchNorm2d",
    "DCGANDiscriminator",
    "DCGANGenerator",
    "DensityCoverage",
    "FeatureClassifier",
    "FusedBatchNorm2d",
    "GANHistory",
    "GANTrainer",
    "KernelDistance",
    "MinibatchStd",
    "ModeCoverage",
    "ModulatedGenerator",
    "ModulatedNorm2d",
    "PixelNorm",
    "PrecisionRecall",
    "ProjectionDiscriminator",
    "ResBlockDown",
    "ResBlockUp",
    "ResNetDiscriminator",
    "ResNetGenerator",
    "SNDCGANDiscriminator",
    "SelfAttention2d",
    "SelfModulatedBatchNorm2d",
    "ShuffledBatches",
    "available_norm_backends",
    "conv_operator_norm",
    "density_coverage",
    "dirac_gan",
    "fold_into_conv",
    "frechet_bias",
    "frechet_distance",
    "gradient_penalty",
    "hinge",
    "icnr_",
    "kernel_distance",
    "least_squares",
    "lipschitz_bound",
    "load_foreign_state_dict",
    "loss_named",
    "minibatch_std",
    "mode_coverage",
    "modulated_batch_norm",
    "modulated_instance_norm",
    "nearest_mode",
    "non_saturating",
    "nyquist_energy",
    "operator_norm_bounds",
    "operator_spectral_norm",
    "overlap_count",
    "phase_response",
    "pixel_norm",
    "precision_recall",
    "r1",
    "r2",
    "recalibrate_batch_norm",
    "receptive_field",
    "relativistic",
    "relativistic_average",
    "upsampling_conv",
    "wasserstein",
]
