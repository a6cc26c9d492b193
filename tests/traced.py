"""What is in a program before it is compiled."""

import collections

import jax
from jax.extend.core import jaxprs_in_params


def equations(function, *args):
    """All equations, those of inner functions included."""

    def of(jaxpr):
        for eqn in jaxpr.eqns:
            yield eqn
            for inner in jaxprs_in_params(eqn.params):
                yield from of(inner)

    return of(jax.make_jaxpr(function)(*args).jaxpr)


def products(function, *args):
    """All products of matrices."""
    return [eqn for eqn in equations(function, *args) if eqn.primitive.name == "dot_general"]


def primitives(function, *args):
    """How many of each primitive there are, inner functions included."""
    return collections.Counter(eqn.primitive.name for eqn in equations(function, *args))
