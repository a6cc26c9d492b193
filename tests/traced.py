"""What is in a program before it is compiled."""

import collections

import jax
from jax.extend.core import jaxprs_in_params


def primitives(function, *args):
    """How many of each primitive there are, inner functions included."""
    found = collections.Counter()

    def collect(jaxpr):
        for eqn in jaxpr.eqns:
            found[eqn.primitive.name] += 1
            for inner in jaxprs_in_params(eqn.params):
                collect(inner)

    collect(jax.make_jaxpr(function)(*args).jaxpr)
    return found
