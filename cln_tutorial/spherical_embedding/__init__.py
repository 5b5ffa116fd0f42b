r"""JoSE: words and documents on the unit sphere, and optimisers for whatever lives there.

.. math:: \ell = [m - v^\top u + v^\top u']_+ + [m - d^\top u + d^\top u'']_+, \qquad
    \|u\| = \|v\| = \|d\| = 1

Source: Su Jianlin, article 7063 (https://kexue.fm/archives/7063), 2019; Meng et al. 2019.
"""

from typing import TYPE_CHECKING, Any

from cln_tutorial.spherical_embedding.geometry import (
    UnitNorm,
    cos_factor,
    expmap,
    frechet_mean,
    geodesic_distance,
    logmap,
    parallel_transport,
    random_unit,
    retract,
    tangent_project,
)
from cln_tutorial.spherical_embedding.objective import jose_loss, jose_step
from cln_tutorial.spherical_embedding.optimisers import SphereAdam, SphereSGD

if TYPE_CHECKING:
    from cln_tutorial.spherical_embedding.estimator import SphericalEmbedding

__all__ = [
    "SphereAdam",
    "SphereSGD",
    "SphericalEmbedding",
    "UnitNorm",
    "cos_factor",
    "expmap",
    "frechet_mean",
    "geodesic_distance",
    "jose_loss",
    "jose_step",
    "logmap",
    "parallel_transport",
    "random_unit",
    "retract",
    "tangent_project",
]


def __getattr__(name: str) -> Any:
    # The estimator needs scikit-learn, the rest of the chapter does not.
    if name == "SphericalEmbedding":
        from cln_tutorial.spherical_embedding.estimator import SphericalEmbedding

        return SphericalEmbedding
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
