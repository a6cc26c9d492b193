"""Cheaper products by choice: what they are in the program, and that the errors they state are true."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import jaxprs_in_params

from netdeconv_jax import DeconvConv, DeconvConvTranspose, DeconvDense, WhiteningSpec, models, ops
from netdeconv_jax.models.summary import layer_table
from netdeconv_jax.ops import roots
from netdeconv_jax.whitening import Chebyshev, ChebyshevRidge, NewtonSchulz
from netdeconv_jax.whitening.channel import ChannelRunning, channel_deconv

HIGHEST = (lax.Precision.HIGHEST,) * 2
HIGH = (lax.Precision.HIGH,) * 2
DEFAULT = (lax.Precision.DEFAULT,) * 2


def dots(function, *args):
    """The dtypes and the precision of all products of matrices, inner functions included."""

    def found(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "dot_general":
                dtypes = [v.aval.dtype.name for v in (*eqn.invars, *eqn.outvars)]
                yield (*dtypes, eqn.params["precision"])
            for inner in jaxprs_in_params(eqn.params):
                yield from found(inner)

    return list(found(jax.make_jaxpr(function)(*args).jaxpr))


def activations(dtype=jnp.float32, shift=0.0, seed=0):
    """What a layer meets: correlated channels behind a ReLU, half of them zeros."""
    rng = np.random.default_rng(seed)
    x = np.maximum(rng.normal(size=(32, 12, 12, 16)) @ rng.normal(size=(16, 16)), 0) + shift
    return jnp.asarray(x, dtype)


def relative(found, wanted):
    found, wanted = np.asarray(found, float), np.asarray(wanted, float)
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


def tf32(a, b, precision="highest"):
    """As a GPU multiplies where it is asked for less than the highest."""
    if precision != "highest":
        a, b = (lax.reduce_precision(m, 8, 10) for m in (a, b))
    return jnp.matmul(a, b, precision="highest")


@pytest.mark.parametrize("one_pass", [False, True])
def test_samples_are_multiplied_as_bfloat16_with_sums_in_float32_and_the_root_at_high(one_pass):
    x = activations(jnp.bfloat16)
    spec = WhiteningSpec.mixed().replace(one_pass=one_pass)
    layer = DeconvConv(4, (3, 3), spec=spec, dtype=jnp.bfloat16)
    variables = layer.init(jax.random.key(0), x, use_running_average=False)

    def loss(params, x):
        variables_ = {**variables, "params": params}
        y, _ = layer.apply(variables_, x, use_running_average=False, mutable=["batch_stats"])
        return y.astype(jnp.float32).sum()

    value = dots(loss, variables["params"], x)
    low = ("bfloat16", "bfloat16", "float32", DEFAULT)
    assert [dot for dot in value if "bfloat16" in dot] == [low]
    both = dots(jax.value_and_grad(loss, argnums=(0, 1)), variables["params"], x)
    sampled = [dot for dot in both if "bfloat16" in dot]
    assert sampled == [low, ("bfloat16", "bfloat16", "bfloat16", DEFAULT)]
    rest = [dot for dot in both if "bfloat16" not in dot]
    assert {dot[:3] for dot in rest} == {("float32",) * 3}
    assert sum(dot[3] == HIGH for dot in rest) == 6 + 12 + 3  # the root and folding, with gradients
    assert sum(dot[3] == HIGHEST for dot in rest) == len(rest) - 21 == 3  # the folded bias


@pytest.mark.parametrize("running", [False, True])
@pytest.mark.parametrize(
    "kind",
    [
        lambda **settings: DeconvConv(4, (3, 3), **settings),
        lambda **settings: DeconvConvTranspose(4, (3, 3), (2, 2), **settings),
        lambda **settings: DeconvDense(4, **settings),
    ],
)
def test_every_layer_folds_a_rounded_kernel_in_less_in_training_alone(kind, running, monkeypatch):
    found = []

    def fold(*args, precision="highest", **settings):
        found.append(precision)
        return original(*args, precision=precision, **settings)

    original = ops.fold
    monkeypatch.setattr(ops, "fold", fold)
    for dtype in (jnp.bfloat16, jnp.float32):
        x = activations(dtype)
        layer = kind(spec=WhiteningSpec.mixed(), dtype=dtype)
        variables = layer.init(jax.random.key(0), x, use_running_average=True)
        found.clear()
        layer.apply(variables, x, use_running_average=running, mutable=["batch_stats"])
        assert set(found) == {"high" if dtype == jnp.bfloat16 and not running else "highest"}


def test_folding_in_tf32_errs_far_less_than_the_rounding_that_follows():
    x = activations().reshape(-1, 16)
    groups = ops.column_groups(channels=16, taps=1, block_size=16)
    whitener = ops.newton_schulz(ops.moments(x).cov + 1e-5 * jnp.eye(16))
    kernel = jnp.asarray(np.random.default_rng(3).normal(size=(1, 1, 16, 64)), jnp.float32)

    def folded(dtype, digits=23):
        kernel_, whitener_ = (lax.reduce_precision(m, 8, digits) for m in (kernel, whitener))
        return ops.fold(kernel_, None, jnp.zeros(16), whitener_, groups, dtype=dtype)[0]

    wanted = folded(jnp.float32)
    rounding = relative(folded(jnp.bfloat16), wanted)
    assert 1e-5 < relative(folded(jnp.float32, 10), wanted) < rounding / 3


@pytest.mark.parametrize(
    ("dtype", "found"), [("float32", "highest"), ("float16", "highest"), ("bfloat16", "high")]
)
def test_a_kernel_is_folded_in_less_only_where_it_is_rounded_to_less(dtype, found):
    def of(spec, training=True):
        return spec.fold_precision(dtype, training=training)

    assert of(WhiteningSpec.mixed()) == found
    assert of(WhiteningSpec(precision="default")) == found  # never one product of bfloat16
    for spec in (WhiteningSpec(), WhiteningSpec.fast(), WhiteningSpec(method="eigh")):
        assert of(spec) == "highest"
    assert of(WhiteningSpec.mixed(), training=False) == "highest"
    with pytest.raises(ValueError, match="`dtype` must be floating point, got int32"):
        WhiteningSpec.mixed().fold_precision("int32", training=True)


def dense(x):
    layer = DeconvDense(4, spec=WhiteningSpec.mixed())
    variables = layer.init(jax.random.key(0), x, use_running_average=False)
    return layer.apply(variables, x, use_running_average=False, mutable=["batch_stats"])


def transposed(x):
    layer = DeconvConvTranspose(4, (3, 3), (2, 2), spec=WhiteningSpec.mixed())
    variables = layer.init(jax.random.key(0), x, use_running_average=False)
    return layer.apply(variables, x, use_running_average=False, mutable=["batch_stats"])


def channels(x):
    start = ChannelRunning.start(8, jnp.float32)
    return channel_deconv(x, start, block=8, spec=WhiteningSpec.mixed())


@pytest.mark.parametrize("layer", [dense, transposed, channels])
def test_other_layers_take_the_choice_too(layer):
    found = dots(layer, activations())
    assert ("bfloat16", "bfloat16", "float32", DEFAULT) in found
    assert ("float32", "float32", "float32", HIGH) in found


@pytest.mark.parametrize("shift", [0.0, 30.0])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_the_covariance_is_off_by_what_is_stated(dtype, shift, masked):
    x = activations(dtype, shift).reshape(-1, 16)
    mask = jnp.arange(len(x)) % 3 != 0 if masked else None
    exact = ops.moments(x, mask)
    found = ops.moments(x, mask, sample_dtype="bfloat16")
    assert found.cov.dtype == jnp.float32
    np.testing.assert_array_equal(found.mean, exact.mean)
    deviations = np.sqrt(np.diagonal(exact.cov))
    assert (np.abs(found.cov - exact.cov) <= 0.008 * np.outer(deviations, deviations)).all()
    assert 1e-6 < relative(found.cov, exact.cov) < 4e-3


@pytest.mark.parametrize("kind", ["none", "mask"])
def test_derivatives_of_rounded_samples_are_off_by_a_percent_forward_and_reverse(kind):
    x = activations().reshape(-1, 16)
    mask = None if kind == "none" else jnp.linspace(0.1, 1, len(x))
    rng = np.random.default_rng(1)
    r = jnp.asarray(rng.normal(size=(16, 16)), jnp.float32)
    v = jnp.asarray(rng.normal(size=x.shape), jnp.float32)

    def cov(x, sample_dtype):
        return ops.moments(x, mask, sample_dtype=sample_dtype).cov

    def gradient(sample_dtype):
        return jax.grad(lambda x: (cov(x, sample_dtype) * r).sum())(x)

    def tangent(sample_dtype):
        return jax.jvp(lambda x: cov(x, sample_dtype), (x,), (v,))[1]

    assert 1e-6 < relative(gradient("bfloat16"), gradient(None)) < 1e-2
    assert 1e-6 < relative(tangent("bfloat16"), tangent(None)) < 1e-2


def test_pooled_over_devices_it_is_the_covariance_of_the_whole_batch():
    x = activations().reshape(4, -1, 16)
    found = jax.vmap(lambda x: ops.moments(x, sample_dtype="bfloat16").psum("i"), axis_name="i")(x)
    whole = ops.moments(x.reshape(-1, 16), sample_dtype="bfloat16")
    assert relative(found.cov[0], whole.cov) < 4e-3


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_whitener_and_its_gradient_are_the_defaults_to_what_is_stated(dtype, monkeypatch):
    x = activations(dtype)
    groups = ops.column_groups(channels=16, taps=9, block_size=64)
    r = jnp.asarray(np.random.default_rng(2).normal(size=(144, 144)), jnp.float32)

    def whitener(x, spec):
        moments = ops.patch_moments(
            x, ops.window((3, 3)), groups, sampling_stride=3, sample_dtype=spec.sample_dtype
        )
        return spec.root(moments.cov + spec.eps * jnp.eye(144))

    def both(spec):
        gradient = jax.grad(lambda x: (whitener(x, spec) * r).sum())(x)
        return whitener(x, spec), gradient

    wanted = both(WhiteningSpec())
    jax.clear_caches()  # of traces with the true product
    monkeypatch.setattr(roots, "multiply", tf32)
    found = both(WhiteningSpec.mixed())
    jax.clear_caches()
    assert 1e-4 < relative(found[0], wanted[0]) < 2e-3
    assert 1e-3 < relative(found[1], wanted[1]) < 2e-2


@pytest.mark.parametrize("precision", ["high", "default", "highest"])
def test_every_root_of_products_says_its_precision(precision):
    a = jnp.eye(6)
    for root in (
        NewtonSchulz(5, precision),
        Chebyshev(precision=precision),
        ChebyshevRidge(precision=precision),
        Chebyshev(num_iters=1, precision=precision),  # runs as the iteration
        NewtonSchulz(15, precision),
    ):
        found = {dot[3] for dot in dots(root, a)}
        assert found <= {(lax.Precision[precision.upper()],) * 2}
        assert found or root == Chebyshev(num_iters=1, precision=precision)


def test_the_precision_of_a_spec_is_shorthand_for_its_roots():
    spec = WhiteningSpec(precision="high")
    assert spec.root == NewtonSchulz(precision="high")
    assert spec.replace(method="chebyshev").root == Chebyshev(precision="high")
    ridged = WhiteningSpec(root=ChebyshevRidge(precision="high"))
    assert ridged.replace(method="newton_schulz").root == NewtonSchulz(precision="high")
    assert spec.replace(num_iters=3).root == NewtonSchulz(3, "high")
    assert WhiteningSpec.mixed() == WhiteningSpec(
        method="chebyshev", precision="high", sample_dtype="bfloat16"
    )
    assert WhiteningSpec().root == NewtonSchulz(precision="highest")
    assert WhiteningSpec().sample_dtype is None
    for name in ("fast", "mixed"):
        assert getattr(WhiteningSpec, name)() == getattr(WhiteningSpec, name)().replace()
    assert WhiteningSpec.fast().sample_dtype is None


@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_the_fast_specs_root_is_three_iterations_to_what_is_stated_in_two_products(shift):
    root = WhiteningSpec.fast().root
    assert isinstance(root, Chebyshev)
    assert (root.num_iters, root.products) == (3, 2)
    assert len(dots(root, jnp.eye(6))) == 2
    cov = ops.moments(activations(shift=shift).reshape(-1, 16)).cov + 1e-5 * jnp.eye(16)
    wanted = ops.newton_schulz(cov, num_iters=3)
    # Of the same eigenvectors: its error along each of them is what the preset states.
    ratios = np.linalg.eigvalsh(root(cov)) / np.linalg.eigvalsh(wanted)
    assert 1e-3 < np.abs(ratios - 1).max() < 6e-3


def test_more_than_five_steps_are_in_float32_unless_asked_otherwise():
    mixed = WhiteningSpec.mixed()
    assert mixed.replace(num_iters=15).root == Chebyshev(num_iters=15)
    assert mixed.replace(num_iters=3).root == Chebyshev(num_iters=3, precision="high")
    assert mixed.replace(num_iters=6, precision="high").root == Chebyshev(
        num_iters=6, precision="high"
    )
    model = models.create("vgg11", "deconv", 10, spec=mixed)
    rows = layer_table(model, (2, 32, 32, 3))
    specs = [row.spec for row in rows if row.kind == "deconv_conv" and row.spec is not None]
    assert specs[0].root == Chebyshev(num_iters=15)
    assert {spec.root for spec in specs[1:]} == {mixed.root}
    assert {spec.sample_dtype for spec in specs} == {"bfloat16"}


def test_a_mask_of_fractions_leaves_the_covariance_symmetric_and_positive():
    x = activations(shift=3.0).reshape(-1, 16)
    mask = jnp.linspace(0.1, 1, len(x))
    exact = ops.moments(x, mask)
    for shift in (None, exact.mean + 0.3, jnp.zeros(16)):
        found = ops.patch_moments(
            x[:, None],
            ops.window((1,)),
            ops.column_groups(channels=16, taps=1, block_size=16),
            mask=mask[:, None, None],
            shift=shift,
            sample_dtype="bfloat16",
        )
        np.testing.assert_allclose(found.cov, found.cov.T, atol=1e-5, rtol=0)
        assert np.linalg.eigvalsh(found.cov).min() > 0
        np.testing.assert_allclose(found.mean, exact.mean, rtol=1e-5)
        assert relative(found.cov, exact.cov) < 4e-3


@pytest.mark.parametrize(("deviations", "bound"), [(0.0, 4e-3), (1.0, 8e-3), (3.0, 0.04)])
def test_in_one_pass_errors_grow_with_what_the_shift_misses(deviations, bound):
    x = activations().reshape(-1, 16)
    exact = ops.moments(x)
    shift = exact.mean + deviations * jnp.sqrt(jnp.diagonal(exact.cov))
    found = ops.patch_moments(
        x[:, None],
        ops.window((1,)),
        ops.column_groups(channels=16, taps=1, block_size=16),
        shift=shift,
        sample_dtype="bfloat16",
    )
    assert 1e-6 < relative(found.cov, exact.cov) < bound
    assert relative(found.mean, exact.mean) < 4e-3 * (1 + deviations)


def test_unknown_values_are_named():
    with pytest.raises(TypeError, match="`sample_dtype` must be None or a string, got dtype"):
        WhiteningSpec(sample_dtype=np.dtype("float32"))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"`sample_dtype` must be one of .*'bfloat16'.*'float16'"):
        WhiteningSpec(sample_dtype="float16")
    with pytest.raises(ValueError, match=r"`sample_dtype` must be one of .*'int8'"):
        ops.moments(jnp.ones((4, 2)), sample_dtype="int8")
    with pytest.raises(ValueError, match=r"`precision` must be one of .*'tf32'"):
        WhiteningSpec(precision="tf32")
    with pytest.raises(ValueError, match=r"`precision` must be one of .*'low'"):
        ops.newton_schulz(jnp.eye(2), precision="low")
    with pytest.raises(ValueError, match=r"`precision`='high' has no meaning for Eigh"):
        WhiteningSpec(method="eigh", precision="high")
