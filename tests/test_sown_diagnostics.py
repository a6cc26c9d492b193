"""What a layer tells of its whitening where it is asked, against NumPy; else nothing changes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from netdeconv_jax import ChannelDeconv, DeconvConv, DeconvConvTranspose, DeconvDense
from netdeconv_jax import nnx as dnnx
from netdeconv_jax.ops import Moments
from netdeconv_jax.whitening import Eigh, WhiteningSpec
from netdeconv_jax.whitening.diagnostics import diagnostics

NAMES = {"effective_rank", "under_ridge", "whitener_norm", "rows_per_dim", "nonfinite"}
EXACT = WhiteningSpec(root=Eigh(), eps=1e-3)


def data(rows=40):
    """Six columns of very different variance."""
    return (
        jax.random.normal(jax.random.key(0), (rows, 6)) * (2.0 ** -jnp.arange(0, 12, 2))[None] + 1
    )


def expected(x, spec=EXACT):
    cov = np.cov(np.asarray(x, np.float64).T, bias=True)
    values = np.linalg.eigvalsh(cov)
    p, ridged = values / values.sum(), values + spec.eps
    return {
        "effective_rank": np.exp(-np.sum(p * np.log(p))),
        "under_ridge": np.mean(ridged < 1e-2 * np.linalg.norm(ridged)),
        "whitener_norm": ridged.min() ** -0.5,
        "rows_per_dim": len(x) / len(cov),
        "nonfinite": False,
    }


def applied(layer, variables, x, *mutable):
    """A pass in training, compiled."""
    return jax.jit(lambda v, x: layer.apply(v, x, False, mutable=[*mutable]))(variables, x)


def check(found, wanted):
    assert set(found) == NAMES
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-3, err_msg=name)


def test_a_linen_layer_sows_where_the_collection_is_mutable():
    x, layer = data(), DeconvDense(3, spec=EXACT)
    variables: Any = layer.init(jax.random.key(1), x, True)
    assert set(variables) == {"params", "batch_stats"}
    y, updates = applied(layer, variables, x, "batch_stats", "diagnostics")
    check({name: value for name, (value,) in updates["diagnostics"].items()}, expected(x))
    plain, others = applied(layer, variables, x, "batch_stats")
    np.testing.assert_array_equal(y, plain)
    assert set(updates) == {"batch_stats", "diagnostics"}
    assert set(others) == {"batch_stats"}
    jax.tree.map(np.testing.assert_array_equal, updates["batch_stats"], others["batch_stats"])
    # In evaluation nothing is whitened by the batch, and nothing is told.
    _, updates = layer.apply(variables, x, True, mutable=["diagnostics"])
    assert not updates.get("diagnostics")


def test_who_does_not_ask_pays_nothing():
    x, layer = data(), DeconvDense(3)
    variables: Any = jax.eval_shape(lambda: layer.init(jax.random.key(1), x, True))

    def program(*mutable):
        def run(variables, x):
            return layer.apply(variables, x, False, mutable=["batch_stats", *mutable])

        return str(jax.make_jaxpr(run)(variables, x))

    assert "eigh" not in program()
    assert "eigh" in program("diagnostics")
    twin = nnx.eval_shape(lambda: dnnx.DeconvDense(6, 3, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(twin)
    assert "eigh" not in str(jax.make_jaxpr(lambda s, x: nnx.merge(graph, s)(x))(state, x))


def test_an_nnx_layer_tells_where_it_is_captured():
    x, layer = data(), dnnx.DeconvDense(6, 3, spec=EXACT, rngs=nnx.Rngs(0))
    y, figures = nnx.capture(layer, dnnx.WhiteningDiagnostic)(x)
    found = {name: value for name, (value,) in nnx.to_pure_dict(figures).items()}
    check(found, expected(x))
    np.testing.assert_allclose(y, layer(x), rtol=1e-6)
    assert not nnx.state(layer, dnnx.WhiteningDiagnostic)
    _, others = nnx.capture(layer, nnx.Intermediate)(x)
    assert not nnx.to_pure_dict(others)


def test_moments_of_microbatches_are_told_together():
    x, layer = data(), DeconvDense(3, spec=EXACT)
    variables: Any = layer.init(jax.random.key(1), x, True)
    mutable = ["moments", "diagnostics"]
    _, first = applied(layer, variables, x[:10], *mutable)
    given = {**variables, "moments": first["moments"]}
    _, both = applied(layer, given, x[10:], *mutable)
    check({name: value for name, (value,) in both["diagnostics"].items()}, expected(x))
    given = {**variables, "moments": both["moments"]}
    _, last = applied(layer, given, x, "batch_stats", "diagnostics")
    check({name: value for name, (value,) in last["diagnostics"].items()}, expected(x))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (DeconvConv(3, (2, 2), block_size=2, shared_whitener=False), (2,)),
        (DeconvConvTranspose(3, (3, 3), 2), (4,)),
        (ChannelDeconv(block_size=3), ()),
        (DeconvDense(3, freeze_schedule=(1, 3)), ()),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_layer_tells_of_each_of_its_whiteners(layer, shape):
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 4))
    shapes = jax.eval_shape(lambda: layer.init(jax.random.key(1), x, True))
    found = jax.eval_shape(
        lambda v: layer.apply(v, x, False, mutable=["diagnostics", "batch_stats"]), shapes
    )[1]["diagnostics"]
    assert {name: value[0].shape for name, value in found.items()} == dict.fromkeys(NAMES, shape)
    assert found["nonfinite"][0].dtype == bool


def test_what_is_not_finite_is_flagged_and_what_is_empty_is_zero():
    spec, cov = WhiteningSpec(), jnp.stack([jnp.eye(2), jnp.eye(2).at[0, 0].set(jnp.inf)])
    moments = Moments(jnp.array([4.0, 4.0]), jnp.zeros((2, 2)), cov)
    found = diagnostics(moments, jnp.broadcast_to(jnp.eye(2), (2, 2, 2)), spec)
    assert found["nonfinite"].tolist() == [False, True]
    assert np.isnan(found["effective_rank"]).tolist() == [False, True]
    none = Moments.none((2,))
    found = diagnostics(none, 3 * jnp.eye(2), spec)
    check(found, {"effective_rank": 0, "whitener_norm": 3, "rows_per_dim": 0, "nonfinite": False})


def test_a_loss_has_the_same_gradient_with_diagnostics():
    x, layer = jnp.ones((4, 3)), DeconvDense(2)  # no eigenvalue is alone: a derivative would be NaN
    variables: Any = layer.init(jax.random.key(1), x, True)

    def loss(params, *mutable):
        given = {**variables, "params": params}
        y, updates = layer.apply(given, x, False, mutable=["batch_stats", *mutable])
        told: Any = updates.get("diagnostics", {})
        return jnp.sum(y**2) + sum(value[0].sum() for value in told.values())

    plain, asked = (jax.grad(loss)(variables["params"], *more) for more in ((), ("diagnostics",)))
    jax.tree.map(np.testing.assert_array_equal, plain, asked)
