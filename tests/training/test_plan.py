"""Plans: operations and traffic are counted rightly, and what does not fit is named with what would."""

import dataclasses
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from experiments.plan import main
from vla_jax.envs.questions import QuestionConfig
from vla_jax.errors import UserError
from vla_jax.losses.objective import LossConfig
from vla_jax.models.normalizer import DataFacts
from vla_jax.training.chips import CHIPS, Chip, parse_topology
from vla_jax.training.costs import Traffic, count_flops, count_traffic, kept_bytes
from vla_jax.training.mesh import MeshConfig
from vla_jax.training.plan import make_plan, remedies, report

ROOT = Path(__file__).parents[2]
FACTS = DataFacts(16, 6, 16, (-1.0,) * 2, (1.0,) * 2, (-1.0,) * 2, (1.0,) * 2)
LAYERS = jax.ShapeDtypeStruct((5, 8, 8), jnp.float32)
X = jax.ShapeDtypeStruct((4, 8), jnp.float32)


def looped(x, layers):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, layers)[0].sum()


def test_operations_count_every_round_of_a_loop_and_nothing_that_is_dropped():
    one = 2 * 4 * 8 * 8
    assert count_flops(jax.make_jaxpr(looped)(X, LAYERS)) == 5 * one

    def dropped(x, layers):
        return looped(x, layers) + 0 * (x @ layers[0]).shape[0], looped(2 * x, layers)

    assert count_flops(jax.make_jaxpr(lambda *a: dropped(*a)[0])(X, LAYERS)) == 5 * one
    gradient = jax.make_jaxpr(jax.grad(looped, 1))(X, LAYERS)
    assert count_flops(gradient) == 15 * one  # forward, and a product for the weights and for the inputs

    def again(x, layers):
        return lax.scan(jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None)), x, layers)[0].sum()

    assert count_flops(jax.make_jaxpr(jax.grad(again, 1))(X, LAYERS)) == 20 * one


def test_what_a_forward_pass_keeps():
    def kept(checkpoint):
        def loss(layers, x):
            def body(x, w):
                return jnp.tanh(jnp.sin(x) @ w), None

            return lax.scan(jax.checkpoint(body) if checkpoint else body, x, layers)[0].sum()

        return kept_bytes(jax.make_jaxpr(lambda layers, x: jax.vjp(loss, layers, x))(LAYERS, X))

    row = 4 * 8 * 4
    assert kept(True) >= 5 * row and kept(False) >= kept(True) + 5 * row


HLO = """HloModule step

%all-reduce-scatter.1 (p: f32[8,4]) -> f32[4,4] {
  %r = f32[8,4]{1,0} all-reduce(%p), channel_id=4, replica_groups=[1,2]<=[2], to_apply=%sum
}

%cond (c: (s32[])) -> pred[] {
  %n = s32[]{:T(128)} constant(36)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%body (c: (s32[])) -> (s32[]) {
  %g = bf16[8,16]{1,0} all-gather(%w), channel_id=1, replica_groups=[1,2]<=[2], dimensions={0}
  %again = bf16[8,16]{1,0} all-gather(%w), channel_id=1, replica_groups=[1,2]<=[2], dimensions={0}
  %f = f32[4,4]{1,0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.1
}

ENTRY %main (a: f32[4]) -> f32[4] {
  %loop = (s32[]) while(%t), condition=%cond, body=%body
  %s = (f32[4]{0}, f32[8]{0}) all-gather-start(%a), channel_id=2, replica_groups={{0,1}}, dimensions={0}
  %d = f32[8]{0} all-gather-done(%s)
  %other = (f32[2]{0}, u32[], token[]) send(%d, %t), channel_id=2, is_host_transfer=true, frontend_attributes={h="x"}
  %send = (f32[2]{0}, u32[], token[]) send(%d, %t), channel_id=2, frontend_attributes={h="xla_megascale_runtime"}
  %sent = token[] send-done(%send), channel_id=2, frontend_attributes={h="xla_megascale_runtime"}
  %rs = f32[4]{0} reduce-scatter(%d), channel_id=3, replica_groups={{0,1}}, dimensions={0}, to_apply=%sum
}
"""


def test_collectives_count_every_round_of_a_loop_once():
    found = count_traffic(HLO)
    assert found["all-gather"] == Traffic(36 + 1, 36 * 8 * 16 * 2 + 8 * 4)
    assert found["reduce-scatter"] == Traffic(36 + 1, 36 * 8 * 4 * 4 + 2 * 4 * 4)
    assert found["between slices"] == Traffic(1, 8)
    assert "all-reduce" not in found


def test_topologies():
    assert (parse_topology("v5p:4x4x4").count, parse_topology("64xH100").count) == (64, 64)
    two = parse_topology("2xv5e:16x16")
    assert (two.count, two.name, two.slices, two.neighbours) == (512, "v5e:16x16", 2, 256)
    assert two.link(256) > 50 * two.link(512)
    assert parse_topology("16xH200").link(8) > 5 * parse_topology("16xH200").link(16)
    with pytest.raises(UserError, match="v5e:16x16.*8xH100"):
        parse_topology("v5litepod-16")


@pytest.fixture
def ready(config):
    """A tiny run whose mesh copies its weights twice."""
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, batch_size=16),
        loss=dataclasses.replace(config.loss, gate=False),
        mesh=MeshConfig(data=2, fsdp=2),
    )


def test_arithmetic_names_what_would_fit(ready, monkeypatch):
    topology = parse_topology("4xH100")
    plan = make_plan(ready, FACTS, topology)
    assert plan.fits and plan.done == plan.flops > 0 and not plan.memory.exact
    text = report(plan, 0.5)
    assert "fits" in text and "chip-hours" in text and "all-gather" in text
    assert plan.computing(0.25) == 2 * plan.computing(0.5)
    # As much memory as the run needs when its weights are split in four.
    split = make_plan(dataclasses.replace(ready, mesh=MeshConfig(data=1, fsdp=4)), FACTS, topology, costs=False)
    assert split.memory.optimiser < plan.memory.optimiser
    monkeypatch.setitem(CHIPS, "H100", Chip(split.memory.total, 1e15, 1e11, 1e10))
    assert not plan.fits and "DOES NOT FIT" in report(plan, 0.5)
    tried = dict(remedies(plan, FACTS))
    assert tried["mesh.data=1 mesh.fsdp=4"].fits
    assert tried["remat=all in every part of the policy"].memory.rest < plan.memory.rest
    assert tried["accumulate=2"].memory.total != plan.memory.total


def test_a_gate_over_the_batch_leaves_the_batch_whole(ready, monkeypatch):
    monkeypatch.setitem(CHIPS, "H100", Chip(1.0, 1e15, 1e11, 1e10))
    gated = dataclasses.replace(ready, loss=dataclasses.replace(ready.loss, gate=True))
    tried = remedies(make_plan(gated, FACTS, parse_topology("4xH100"), costs=False), FACTS)
    assert tried and not any("accumulate" in name or other.fits for name, other in tried)


def test_of_a_run_on_questions_alone_the_size_of_a_batch_of_demonstrations_is_no_matter(ready):
    questions = dataclasses.replace(
        ready,
        data=dataclasses.replace(ready.data, batch_size=3),
        questions=QuestionConfig(batch_size=4),
        loss=LossConfig(demonstrations=False, prior_weight=0.0, llr_weight=0.0, question_weight=1.0),
    )
    assert make_plan(questions, FACTS, parse_topology("4xH100"), costs=False).fits
    with pytest.raises(UserError, match="questions.batch_size 6 cannot be divided"):
        odd = dataclasses.replace(questions, questions=QuestionConfig(batch_size=6))
        make_plan(odd, FACTS, parse_topology("4xH100"), costs=False)


def test_without_data_a_plan_has_the_sizes_of_the_pretrained_model(monkeypatch):
    asked = []

    def wide(directory, policy):
        return dataclasses.replace(policy, trunk=dataclasses.replace(policy.trunk, width=len(directory)))

    monkeypatch.setattr("vla_jax.pretrained.backbone.policy_on", wide)
    monkeypatch.setattr(
        "vla_jax.training.plan.make_plan", lambda config, *_: asked.append(config) or SimpleNamespace(fits=True)
    )
    monkeypatch.setattr("vla_jax.training.plan.report", lambda *_: "")
    config = f"--config={ROOT / 'configs/train.py'}"
    main([config, "--config.pretrained.directory=CHECKPOINT", "--topology=1xH100"])
    assert asked[0].policy.trunk.width == len("CHECKPOINT")


def test_what_is_frozen_gets_no_gradient_no_moments_and_no_average(ready):
    scales = (("^(vision|trunk|words|head|queries)(/|$)", 0.0),)
    frozen = dataclasses.replace(ready, optimizer=dataclasses.replace(ready.optimizer, scales=scales))
    topology = parse_topology("4xH100")
    whole, part = (make_plan(run, FACTS, topology) for run in (ready, frozen))
    assert part.memory.weights == whole.memory.weights
    assert 0 < part.memory.average < 0.6 * whole.memory.average and part.memory.optimiser < 0.6 * whole.memory.optimiser
    # Gradients of the expert alone, and nothing that the forward pass of the rest would have to keep.
    assert part.memory.rest < 0.5 * whole.memory.rest
    assert part.flops < 0.7 * whole.flops
    assert part.traffic["reduce-scatter"].size < 0.6 * whole.traffic["reduce-scatter"].size
    assert part.traffic["all-gather"] == whole.traffic["all-gather"]


def plan_command(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "experiments.plan", "--config=configs/train.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=500)


@pytest.mark.slow
def test_a_plan_that_does_not_fit_ends_with_status_1(dataset):
    huge = [f"--config.policy.trunk.{name}" for name in ("width=16384", "hidden=65536")]
    data = (f"--config.data.directory={dataset}", "--config.policy.views=front", "--config.data.batch_size=2")
    done = plan_command("--topology=1xH100", *huge, *data)
    assert done.returncode == 1, done.stderr
    assert "pictures of 224" not in done.stdout  # sizes are those of the dataset
    assert "DOES NOT FIT" in done.stdout and "still too much" in done.stdout and "take more chips" in done.stdout
    wrong = plan_command("--topology=1xH100", "--mfu=40")
    assert wrong.returncode == 2 and "--mfu is a share" in wrong.stderr


needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is missing: pip install 'libtpu==0.0.42.*'"
)


@needs_compiler
def test_the_tpu_compiler_says_what_a_step_needs(ready):
    plan = make_plan(ready, FACTS, parse_topology("v5e:2x2"))
    assert plan.memory.exact and plan.fits and plan.memory.rest > 0
    estimate = make_plan(ready, FACTS, parse_topology("4xH100"), costs=False)
    assert (plan.memory.weights, plan.memory.optimiser) == (estimate.memory.weights, estimate.memory.optimiser)
    assert {"all-gather", "all-reduce"} <= set(plan.traffic) and plan.moving > 0
    assert "between slices" not in plan.traffic
    large = dataclasses.replace(ready, data=dataclasses.replace(ready.data, batch_size=2**24))
    beyond = make_plan(large, FACTS, parse_topology("v5e:2x2"), costs=False)
    assert not beyond.fits and beyond.memory.rest > 16e9  # the compiler gave up, and said what it would have needed


@pytest.mark.slow
@needs_compiler
def test_little_but_the_sum_of_the_gradients_goes_between_slices(ready):
    wide, tiny = dict(width=256, hidden=512), ready.policy
    policy = dataclasses.replace(
        tiny,
        vision=dataclasses.replace(tiny.vision, **wide),
        trunk=dataclasses.replace(tiny.trunk, **wide, heads=2, kv_heads=2, head_width=64),
        expert=dataclasses.replace(tiny.expert, **wide, heads=2, head=64),
    )
    config = dataclasses.replace(ready, policy=policy, mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    plan = make_plan(config, FACTS, parse_topology("2xv5e:2x2"))
    between = plan.traffic["between slices"].size
    assert 0.5 * plan.memory.weights < between < plan.memory.weights  # a chip sends its part
    assert "8 x v5e in 2 slices, data=2 fsdp=2 tensor=2" in report(plan, 0.5)
    others = sum(part.size for part in plan.traffic.values()) - between
    slow = plan.topology.chip.network
    assert between / slow < plan.moving < between / slow + others / slow / 10
