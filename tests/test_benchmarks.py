"""What the benchmarks read, count and reckon, where a mistake would not show in their figures."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks import contenders, kernels, roofline, scaling, stages, step_time
from netdeconv_jax import WhiteningSpec, models
from netdeconv_jax.models.summary import layer_table
from netdeconv_jax.whitening import Budget, Chebyshev
from train.parallel import compiler_options


def test_a_list_of_contenders_is_divided_at_norms():
    found = contenders.parse("batch,deconv,deconv:fast,block_size=32,deconv:method=chebyshev,none")
    assert [c.text for c in found] == [
        "batch",
        "deconv",
        "deconv:fast,block_size=32",
        "deconv:method=chebyshev",
        "none",
    ]
    assert [c.norm for c in found] == ["batch", "deconv", "deconv", "deconv", "none"]
    assert found[1].spec == WhiteningSpec()
    assert found[2].spec == WhiteningSpec.fast().replace(block_size=32)
    assert found[3].spec == WhiteningSpec(method="chebyshev")


def test_settings_are_those_of_the_spec_and_of_its_strategies():
    (found,) = contenders.parse("deconv:tol=2e-3,rows_per_dim=8,whiten=channels")
    assert found.spec == WhiteningSpec(root=Chebyshev(2e-3), sampling=Budget(8), whiten="channels")


def test_a_contender_may_reuse_its_whiteners_and_takes_no_covariance_then():
    reused, computed = contenders.parse("deconv:reused,block_size=8,deconv:block_size=8")
    assert (reused.reused, computed.reused) == (True, False)
    assert reused.spec == computed.spec
    assert reused.text == "deconv:reused,block_size=8"
    images, labels = jnp.ones((4, 8, 8, 3)), jnp.zeros(4, int)
    flops = [
        contenders.Step(entry, "cnn", images, labels, width=0.25).resources()["flops"]
        for entry in (reused, computed)
    ]
    assert flops[0] < 0.7 * flops[1]


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("layer", ValueError, "'layer'"),
        ("deconv,layer:fast", ValueError, "'layer:fast'"),
        ("deconv:slow", ValueError, "'slow'"),
        ("deconv:blocks=3", TypeError, "'blocks'"),
    ],
)
def test_what_is_no_contender_is_named(text, error, words):
    with pytest.raises(error, match=words):
        contenders.parse(text)


def test_a_step_without_a_root_has_no_product_of_the_root():
    cov = jnp.eye(3)
    (plain,) = contenders.parse("deconv:no_root")
    dots = [
        e for e in jax.make_jaxpr(plain.spec.root)(cov).eqns if e.primitive.name == "dot_general"
    ]
    assert dots == []
    assert jnp.allclose(plain.spec.root(cov), (1.5 - 0.5 / 3**0.5) / 3**0.25 * cov)


def test_a_compiled_step_trains_and_tells_what_it_takes():
    images, labels = jnp.ones((4, 8, 8, 3)), jnp.zeros(4, int)
    (contender,) = contenders.parse("deconv:block_size=4")
    step = contenders.Step(contender, "cnn", images, labels, width=0.125)
    before = jax.tree.map(jnp.copy, step.state[0])
    seconds, processor = step(images, labels, times=2)
    assert seconds > 0
    assert processor > 0
    changed = jax.tree.map(lambda old, new: bool((old != new).any()), before, step.state[0])
    assert any(jax.tree.leaves(changed))
    found = step.resources()
    parameters = 4 * sum(leaf.size for leaf in jax.tree.leaves(before))
    assert found["peak_bytes"] > 2 * parameters  # with their momentum
    assert found["flops"] > 0
    assert set(step.seconds) == {"trace", "lower", "compile"}
    kept = contenders.kept(step.model, contender, step.state, images, labels)
    assert kept["float32[36,36]"] >= 2 * 4 * 36**2  # matrices of a root, four channels of 3x3
    assert kept["float32[4,8,8,3]"] == 4 * images.size


def test_ratios_are_taken_within_a_round():
    rows = {
        "a": {"step_seconds": [1.0, 2.0, 4.0], "processor_seconds": [1.0, 1.0, 1.0]},
        "b": {"step_seconds": [2.0, 2.0, 2.0], "processor_seconds": [3.0, 3.0, 3.0]},
    }
    found = step_time.summarized(rows, "a")
    assert found["b"]["ratio"] == {"median": 1.0, "least": 0.5, "most": 2.0}
    assert found["b"]["processor_ratio"]["median"] == 3.0
    assert found["a"]["seconds"] == {"median": 2.0, "least": 1.0, "most": 4.0}


def test_the_parts_of_a_network_are_those_of_its_layers():
    model = models.create("cnn", "deconv", width=0.125)
    rows = layer_table(model, (2, 8, 8, 3))
    kinds = [stages._parts(row, jnp.float32) for row in rows if row.kind == "deconv_conv"]
    assert len(kinds) == 4
    assert all(set(parts) == {"statistics", "root", "fold", "convolution"} for parts in kinds)
    layers = [{"count": 3, "parts": {"root": {"forward": 1.0, "both": 2.0}}}] * 2
    assert stages.totals(layers) == {"root": {"forward": 6.0, "both": 12.0}}


def test_the_least_time_is_that_of_the_design():
    # The design's, for one H200, batch 256: convolutions 7 ms, covariance 19, root 4.4, batch norm 1.9.
    def least(norm, spec=None):
        model = models.create("resnet18_imagenet", norm, spec=spec or WhiteningSpec())
        found = roofline.least_seconds(layer_table(model, (256, 224, 224, 3)), roofline.H200)
        return {part: 1e3 * seconds for part, seconds in found.items()}

    deconv, batch = least("deconv"), least("batch")
    assert deconv["convolution"] == pytest.approx(7, rel=0.1)
    assert deconv["statistics"] == pytest.approx(19, rel=0.1)
    assert deconv["root"] == pytest.approx(4.4, rel=0.1)
    assert batch["batch_norm"] == pytest.approx(1.9, rel=0.4)
    assert batch["statistics"] == batch["root"] == deconv["batch_norm"] == 0
    # Cheaper products: statistics at the rate of bfloat16, half as many of the root's at that of TF32.
    mixed = least("deconv", WhiteningSpec.mixed())
    assert mixed["statistics"] == pytest.approx(deconv["statistics"] / 8, rel=0.2)
    assert mixed["root"] == pytest.approx(deconv["root"] / 8, rel=0.1)
    assert mixed["fold"] == deconv["fold"]


def test_collectives_are_counted_with_the_bytes_of_their_results():
    text = """
  %a = f32[2,8]{1,0} all-reduce(f32[2,8]{1,0} %x), channel_id=1
  %b = (f32[4]{0}, /*index=1*/bf16[3,3]{1,0}, f32[]) all-reduce-start(f32[4]{0} %y), channel_id=2
  %c = (f32[4]{0}) all-reduce-done(%b)
  ROOT %d = u32[5]{0} all-gather(u32[1]{0} %z)
"""
    assert scaling.collectives(text) == {
        "all-reduce": {"count": 2, "bytes": 64 + 16 + 18 + 4},
        "all-gather": {"count": 1, "bytes": 20},
    }


def test_kernels_of_a_program_are_told_by_kind_and_part():
    program = """HloModule jit_step
fused { ROOT %a = f32[] add(%b, %c) }

ENTRY %main {
  %p = f32[4]{0} parameter(0)
  %f.1 = (f32[4]{0}, f32[]) fusion(%p), kind=kInput, metadata={op_name="jvp(M)/jit(_own_moments)/sub"}
  %g = f32[4]{0} get-tuple-element(%f.1), index=0
  %d = (f32[4], s8[8]) custom-call(%g), custom_call_target="__cublas$lt$matmul", op_name="transpose(M)/_fold"
  ROOT %c.2 = f32[4]{0} copy(%g)
}
"""
    found = kernels.operations(program)
    assert [kind for _, kind in found] == ["fusion Input", "cublas$lt$matmul", "copy"]
    assert [kernels.part_of(line) for line, _ in found] == [
        "statistics, forward",
        "folding, backward",
        "rest",
    ]


@pytest.mark.parametrize("switch", [False, True])
def test_kernels_in_the_branches_of_a_conditional_are_counted(switch):
    def heavy(x):
        return jnp.linalg.cholesky(x)  # a call of a library, on a CPU too

    def step(x, n):
        branches = (lambda x: x, heavy)
        return (
            jax.lax.switch(n, (*branches, heavy), x)
            if switch
            else jax.lax.cond(n > 1, *branches[::-1], x)
        )

    text = jax.jit(step).lower(jnp.eye(8), 0).compile().as_text()
    assert text is not None
    calls = [kind for _, kind in kernels.operations(text) if "potrf" in kind]
    assert len(calls) == 1 + switch


def test_on_a_gpu_products_are_left_to_cublas(monkeypatch):
    assert compiler_options() == {}
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    options = compiler_options()
    assert options == {"xla_gpu_enable_triton_gemm": False}
    compiled = jax.jit(lambda x: x @ x).lower(jnp.eye(2)).compile(options)  # a flag that XLA knows
    assert compiled(2 * jnp.eye(2))[0, 0] == 4
    with pytest.raises(jax.errors.JaxRuntimeError, match="no_such_flag"):
        jax.jit(lambda x: x @ x).lower(jnp.eye(2)).compile({"no_such_flag": False})
