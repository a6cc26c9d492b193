"""`ops.relu`: what `jax.nn.relu` computes, to any order, from its output alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from netdeconv_jax import ops

EDGES = [-jnp.inf, -1.0, -0.0, 0.0, 1e-45, 1e-30, 2.0, jnp.inf, jnp.nan]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_value_and_derivatives_are_those_of_jax(dtype):
    x = jnp.array(EDGES, dtype)
    tangent = jnp.arange(1, 1 + len(EDGES), dtype=dtype)
    for compiled in (lambda f: f, jax.jit):
        ours, its = (
            compiled(lambda x, t, f=f: (*jax.jvp(f, (x,), (t,)), *jax.vjp(f, x)[1](t)))(x, tangent)
            for f in (ops.relu, jax.nn.relu)
        )
        for one, other in zip(ours, its, strict=True):
            assert one.dtype == other.dtype == dtype
            np.testing.assert_array_equal(one.astype("float32"), other.astype("float32"))


def test_the_second_derivative_is_zero_and_mapped_gradients_are_each_one_s():
    x = jnp.array([-1.0, 0.0, 3.0])

    def square(x):
        return ops.relu(x) ** 2 / 2

    np.testing.assert_array_equal(jax.vmap(jax.grad(square))(x), [0, 0, 3])
    np.testing.assert_array_equal(jax.vmap(jax.grad(jax.grad(square)))(x), [0, 0, 1])
    np.testing.assert_array_equal(jax.hessian(lambda x: ops.relu(x).sum())(x), np.zeros((3, 3)))


def test_integers_and_plain_numbers_are_rectified():
    assert ops.relu(jnp.array([-2, 3])).tolist() == [0, 3]
    assert ops.relu(-2.0) == 0  # pyright: ignore[reportArgumentType]


def test_gradients_are_right_to_second_order():
    for dtype in ("float32", "float64"):
        with jax.enable_x64(dtype == "float64"):
            x = jnp.array([-2.0, -0.5, 0.7, 3.0], dtype)
            check_grads(lambda x: ops.relu(x) ** 3, (x,), order=2, modes=("fwd", "rev"))


def test_the_derivative_reads_the_output():
    ones = jnp.ones(3)
    program = jax.make_jaxpr(lambda x, t: jax.vjp(ops.relu, x)[1](t))(ones, ones).jaxpr
    (rectified,) = (eqn for eqn in program.eqns if program.invars[0] in eqn.invars)
    (sign,) = (eqn for eqn in program.eqns if eqn.primitive.name == "sign")
    assert sign.invars == rectified.outvars


def test_the_compiler_does_not_go_back_to_the_input():
    # As it does where the output is compared with 0, whose sign is gone then.
    def step(x, cotangent):
        y, vjp = jax.vjp(ops.relu, x)
        return y, vjp(cotangent)[0]

    x = jnp.ones(8)
    program = jax.jit(step).lower(x, x).compile().as_text() or ""
    assert "sign(" in program


@pytest.mark.parametrize("x", [jnp.array([True]), jnp.array([1j])])
def test_what_has_no_half_axis_is_refused(x):
    with pytest.raises(TypeError, match=f"`x` must be floating point or integers, got {x.dtype}"):
        ops.relu(x)
