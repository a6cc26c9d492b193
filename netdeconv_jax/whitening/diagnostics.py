"""What whitening had to do, in numbers: computed on the device, and only where somebody asks."""

import jax
import jax.numpy as jnp
from jax import lax

from netdeconv_jax.ops import Moments
from netdeconv_jax.ops.roots import identity_like
from netdeconv_jax.whitening.running import where_any, whitener_of
from netdeconv_jax.whitening.spec import WhiteningSpec

SOFT_RIDGE = 1e-2  # of ||Cov||_F: what five iterations leave less than half whitened


def diagnostics(moments: Moments, whitener: jax.Array, spec: WhiteningSpec) -> dict[str, jax.Array]:
    """Return figures of the moments that a layer whitens by, without derivatives.

    With eigenvalues v of Cov and p = v / sum(v): `effective_rank` is exp(-sum p log p), between 1 and d (0
    where all v are 0). `under_ridge` is the share of eigenvalues of A = Cov + eps I below 1e-2 ||A||_F, which
    five iterations leave mostly as they are. `whitener_norm` is the spectral norm of D, `rows_per_dim` the
    number of samples by d. `nonfinite` is True where a mean, a covariance or a whitener is not finite; the
    figures that depend on it are NaN there.

    Args:
      moments: mean [*stat_shape, d]. Of no samples while a freeze schedule uses running statistics.
      whitener: [*stat_shape, d, d], the running one, which serves where there are no samples.
      spec: root and eps.
    Returns:
      By name, each [*stat_shape].

    Source: Roy and Vetterli 2007, for the effective rank; else ours.
    """
    moments, whitener = lax.stop_gradient((moments, whitener))
    width = moments.mean.shape[-1]
    count = jnp.broadcast_to(moments.count, moments.mean.shape[:-1])
    whitener = where_any(count, whitener_of(moments, spec), whitener)
    finite = jnp.isfinite(moments.mean).all(-1)
    finite &= (jnp.isfinite(moments.cov) & jnp.isfinite(whitener)).all((-2, -1))

    def sound(matrix: jax.Array) -> jax.Array:
        # An eigensolver need not come back from what is not finite.
        return jnp.where(finite[..., None, None], matrix, identity_like(matrix))

    cov = sound(moments.cov)
    values = jnp.maximum(jnp.linalg.eigvalsh(cov), 0)
    total = values.sum(-1, keepdims=True)
    shares = values / jnp.where(total > 0, total, 1)
    entropy = -jnp.sum(shares * jnp.log(jnp.where(shares > 0, shares, 1)), -1)
    ridged = values + spec.eps
    ridge = SOFT_RIDGE * jnp.linalg.norm(ridged, axis=-1, keepdims=True)
    d = sound(whitener)
    figures = {
        "effective_rank": jnp.where(total[..., 0] > 0, jnp.exp(entropy), 0),
        "under_ridge": (ridged < ridge).mean(-1, dtype=cov.dtype),
        "whitener_norm": jnp.sqrt(jnp.linalg.eigvalsh(jnp.swapaxes(d, -1, -2) @ d)[..., -1]),
    }
    figures = {name: jnp.where(finite, value, jnp.nan) for name, value in figures.items()}
    return figures | {"rows_per_dim": count / width, "nonfinite": ~finite}
