"""What takes part in a benchmark: a network with a choice of norm and spec, and its compiled training step.

A list of contenders is written `norm[:setting[,setting...]][,norm...]`. A setting is `fast` or `mixed`, for
`WhiteningSpec.fast()` and `WhiteningSpec.mixed()`; `no_root`, for statistics and folding with a root that
takes no product; `reused`, for a step with `update_whitener=False`; or `key=value`, a keyword of
`WhiteningSpec` or one of `tol`, `ridge`, `chebyshev_ridge` and `rows_per_dim`. So
`batch,deconv,deconv:fast,block_size=32,deconv:method=chebyshev` names four.
"""

import ast
import collections
import dataclasses
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax

from netdeconv_jax import WhiteningSpec, models, ops
from netdeconv_jax.models.units import NORMS
from netdeconv_jax.whitening import Budget, Chebyshev, ChebyshevRidge, Eigh
from train.parallel import compiler_options

RATE = 1e-3  # random labels teach nothing; a small rate keeps the loss finite
_STRATEGIES = {
    "tol": lambda tol, precision: {"root": Chebyshev(tol, precision=precision)},
    "ridge": lambda ridge, _: {"root": Eigh(ridge)},
    "chebyshev_ridge": lambda ridge, precision: {
        "root": ChebyshevRidge(ridge, precision=precision)
    },
    "rows_per_dim": lambda rows, _: {"sampling": Budget(rows)},
}


@dataclasses.dataclass(frozen=True)
class NoRoot:
    """`1.5 I - 0.5 cov / ||cov||`: the iteration's first step. All that a root needs but its products."""

    products = 0

    def __call__(self, cov: jax.Array) -> jax.Array:
        return ops.newton_schulz(cov, num_iters=1)


@dataclasses.dataclass(frozen=True)
class Contender:
    """One entry of the list: its text, its norm, how it whitens, and whether it reuses whiteners."""

    text: str
    norm: str
    spec: WhiteningSpec
    reused: bool = False


def parse(text: str) -> list[Contender]:
    """Return the contenders of a list such as `batch,deconv:block_size=16,method=chebyshev`.

    Raises:
      ValueError: an unknown norm, or a setting that is none.
    """
    entries: list[list[str]] = []
    for piece in text.split(","):
        norm, colon, setting = piece.partition(":")
        if norm in NORMS:
            entries.append([norm, setting] if colon else [norm])
        elif entries and not colon:
            entries[-1].append(piece)
        else:
            raise ValueError(f"`contenders` must begin with one of {NORMS}, got {piece!r}.")
    return [_contender(norm, settings) for norm, *settings in entries]


def _contender(norm: str, settings: list[str]) -> Contender:
    spec = WhiteningSpec()
    for setting in settings:
        if setting == "reused":
            continue
        key, equals, value = setting.partition("=")
        if setting in ("fast", "mixed"):
            spec = getattr(WhiteningSpec, setting)()
        elif setting == "no_root":
            spec = spec.replace(root=NoRoot())
        elif not equals:
            raise ValueError(
                "`contenders` take settings `fast`, `mixed`, `no_root`, `reused` or `key=value`, got "
                f"{setting!r}."
            )
        else:
            change = _STRATEGIES.get(key, lambda value, _, key=key: {key: value})
            precision = getattr(spec.root, "precision", "highest")
            spec = spec.replace(**change(_literal(value), precision))
    text = ":".join([norm, ",".join(settings)]) if settings else norm
    return Contender(text, norm, spec, reused="reused" in settings)


def _literal(value: str) -> Any:
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value


def functions(model: Any, contender: Contender) -> tuple[Any, Any]:
    """Return `init(key, image)`, which makes a state, and `step(state, images, labels)`.

    Args:
      model: of the zoo.
      contender: says whether whiteners are reused.
    """
    optimizer = optax.sgd(RATE, momentum=0.9)
    loss_of = _loss(model, contender)

    def init(key: jax.Array, image: jax.Array) -> Any:
        variables = model.init(key, image, train=False)
        params, stats = variables["params"], variables.get("batch_stats", {})
        return params, stats, optimizer.init(params)

    def step(state: Any, images: jax.Array, labels: jax.Array) -> Any:
        params, stats, opt_state = state
        differentiated = jax.value_and_grad(loss_of, has_aux=True)
        (loss, stats), grads = differentiated(params, stats, images, labels)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), stats, opt_state), loss

    return init, step


def _loss(model: Any, contender: Contender) -> Any:
    """Return `loss(params, stats, images, labels)`, with the new stats beside it."""

    def loss_of(params: Any, stats: Any, images: jax.Array, labels: jax.Array) -> Any:
        logits, updates = model.apply(
            {"params": params, "batch_stats": stats},
            images,
            train=True,
            update_whitener=not contender.reused,
            mutable=["batch_stats"],
            rngs=_dropout(),
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), updates.get("batch_stats", {})

    return loss_of


def kept(
    model: Any, contender: Contender, state: Any, images: Any, labels: Any
) -> collections.Counter[str]:
    """Return the bytes that JAX's forward pass hands to the backward one, by dtype and shape of the arrays.

    Parameters among them. XLA shares, drops and recomputes some: the step's peak may be less.
    """
    loss_of = _loss(model, contender)

    def forward(params: Any, stats: Any, images: jax.Array, labels: jax.Array) -> Any:
        _, backward, _ = jax.vjp(
            lambda params: loss_of(params, stats, images, labels), params, has_aux=True
        )
        return jax.tree.leaves(backward)

    found: collections.Counter[str] = collections.Counter()
    for array in jax.eval_shape(forward, *state[:2], images, labels):
        shape = ",".join(map(str, array.shape))
        found[f"{array.dtype}[{shape}]"] += math.prod(array.shape) * array.dtype.itemsize
    return found


class Step:
    """One training step of a contender, SGD with momentum, traced, lowered and compiled.

    Attributes:
      model: the network.
      compiled: takes a state, which it donates, images and labels; returns a state and the loss.
      seconds: of tracing, lowering, compiling.
      state: replaced by every call.
    """

    def __init__(
        self, contender: Contender, network: str, images: Any, labels: Any, **options: Any
    ):
        self.model = models.create(
            network, contender.norm, num_classes=10, spec=contender.spec, **options
        )
        init, step = functions(self.model, contender)
        self.state = jax.jit(init)(jax.random.key(0), images[:1])
        self.seconds = {}
        traced = self._timed(
            "trace", lambda: jax.jit(step, donate_argnums=0).trace(self.state, images, labels)
        )
        lowered = self._timed("lower", traced.lower)
        self.compiled = self._timed("compile", lambda: lowered.compile(compiler_options()))

    def _timed(self, name: str, function: Any) -> Any:
        start = time.perf_counter()
        result = function()
        self.seconds[name] = time.perf_counter() - start
        return result

    def __call__(self, images: jax.Array, labels: jax.Array, times: int = 1) -> tuple[float, float]:
        """Take some steps; return the seconds of one, and its seconds of processor time.

        Raises:
          FloatingPointError: the loss is not finite: what was timed is no training.
        """
        loss = None
        start, processor = time.perf_counter(), time.process_time()
        for _ in range(times):
            self.state, loss = self.compiled(self.state, images, labels)
        jax.block_until_ready(self.state)
        seconds = time.perf_counter() - start, time.process_time() - processor
        if loss is None or not jnp.isfinite(loss):
            raise FloatingPointError(f"The loss is {loss}.")
        return seconds[0] / times, seconds[1] / times

    def resources(self) -> dict[str, float]:
        """Return bytes and flops as the compiler reckons them."""
        cost = self.compiled.cost_analysis() or {}
        return {
            **memory(self.compiled),
            "flops": cost.get("flops", 0.0),
            "bytes_accessed": cost.get("bytes accessed", 0.0),
        }


def memory(compiled: Any) -> dict[str, int]:
    """Return the bytes of a program as the compiler reckons them; `peak` is all that it holds."""
    found = compiled.memory_analysis()
    kinds = ("argument", "output", "alias", "temp")
    sizes = {kind: getattr(found, f"{kind}_size_in_bytes") for kind in kinds}
    peak = sizes["argument"] + sizes["output"] - sizes["alias"] + sizes["temp"]
    return {"peak_bytes": peak, **{f"{kind}_bytes": size for kind, size in sizes.items()}}


def _dropout() -> dict[str, jax.Array]:
    return {"dropout": jax.random.key(0)}
