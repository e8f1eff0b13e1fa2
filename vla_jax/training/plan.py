"""Does a run fit its chips, how long does it take, and what would make it fit: before anything is paid for.

For TPUs the training step itself is compiled ahead of time, on a machine without one; nothing is allocated. For GPUs
the sizes are arithmetic: exact for weights, optimiser and gradients; activations are what the forward pass keeps.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from vla_jax.errors import UserError
from vla_jax.models.normalizer import DataFacts
from vla_jax.nn.placement import AXES
from vla_jax.training.chips import Topology
from vla_jax.training.costs import BETWEEN_SLICES, Traffic, count_flops, count_traffic, kept_bytes
from vla_jax.training.mesh import bytes_on_device, in_units, make_mesh
from vla_jax.training.program import Program, batch_shapes, make_program
from vla_jax.training.state import merge
from vla_jax.training.train_config import TrainConfig

TOWERS = {"qwen3_vl": "qwen_vision", "vit": "vision"}  # vision encoders that can compute layers again
_SIZE = r"([\d.]+)([KMGT])i?B?"
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on a chip. rest: activations, gradients and temporaries. exact: the compiler's number, not an estimate.

    Where the compiler gives up, `rest` is what it would have needed.
    """

    weights: float
    average: float
    optimiser: float
    batch: float
    rest: float
    exact: bool

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.average + self.optimiser + self.batch + self.rest


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run needs of its chips.

    shape: of the mesh. flops: of a step on all chips, without what is computed twice to save memory; done: with it.
    traffic: collectives of a step by kind; None where the compiler gave up.
    """

    config: TrainConfig
    topology: Topology
    shape: tuple[int, int, int]
    memory: Memory
    flops: float
    done: float
    traffic: dict[str, Traffic] | None

    @property
    def fits(self) -> bool:
        """Whether a chip holds its part."""
        return self.memory.total <= self.topology.chip.memory

    def computing(self, mfu: float) -> float:
        """Seconds of a step at a model FLOPs utilisation (arXiv 2204.02311), a share of the chips' peak."""
        return self.flops / (self.topology.count * self.topology.chip.flops * mfu)

    @property
    def moving(self) -> float:
        """Seconds that the links are busy in a step, at their full speed; 0 where nothing is known."""
        _, fsdp, tensor = self.shape
        # Neighbours share weights; what all copies of them sum goes everywhere, which the compiler splits into a sum
        # in each slice and one between them.
        reach = {"all-gather": fsdp * tensor, "reduce-scatter": fsdp * tensor, BETWEEN_SLICES: self.topology.count}
        everywhere = self.topology.neighbours if self.memory.exact else self.topology.count
        return sum(
            part.size / self.topology.link(reach.get(kind, everywhere)) for kind, part in (self.traffic or {}).items()
        )


def make_plan(config: TrainConfig, facts: DataFacts, topology: Topology, costs: bool = True) -> Plan:
    """Plans a run. costs: count operations and traffic as well, which takes longer.

    Raises:
        UserError: settings that do not fit one another or the chips' number, or a missing TPU compiler.
    """
    if topology.name:
        mesh = make_mesh(config.mesh, topology.devices())
    else:
        shape = config.mesh.shape(topology.count)
        mesh = jax.sharding.AbstractMesh(shape, AXES)
    shape = tuple(mesh.shape[axis] for axis in AXES)
    program = make_program(config, facts, mesh)
    held = _held(program, config, facts, mesh)
    traced = program.step.trace(program.shapes, batch_shapes(config, facts, mesh)) if topology.name or costs else None
    traffic = None
    if topology.name:
        rest, traffic = _compile(traced, held, costs)
    else:
        rest, traffic = _estimate(program, config, facts, shape), _expected_traffic(program, config, shape)
    flops = done = 0.0
    if costs:
        done = count_flops(traced.jaxpr)
        flops = _model_flops(config, facts, mesh)
    return Plan(config, topology, shape, Memory(*held, rest, exact=bool(topology.name)), flops, done, traffic)


def _held(program: Program, config: TrainConfig, facts: DataFacts, mesh: Any) -> tuple[float, float, float, float]:
    """Bytes of weights, averaged weights, optimiser and batch on a chip."""
    shapes, places, batch = program.shapes, program.shardings, batch_shapes(config, facts, mesh)
    batch_places = jax.tree.map(lambda shape: shape.sharding, batch)
    return (
        bytes_on_device([shapes.params, shapes.constants], [places.params, places.constants]),
        bytes_on_device(shapes.ema, places.ema),
        bytes_on_device(shapes.opt_state, places.opt_state),
        bytes_on_device(batch, batch_places),
    )


def _compile(traced: Any, held: tuple[float, ...], costs: bool) -> tuple[float, dict[str, Traffic] | None]:
    """Bytes beside those that are held, and the traffic, by the TPU compiler."""
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return _needed(str(error)), None
    memory = compiled.memory_analysis()
    # Arguments are held; results take their place, and what does not is new.
    used = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    used += memory.argument_size_in_bytes + memory.generated_code_size_in_bytes
    return max(used - sum(held), 0.0), count_traffic(compiled.as_text()) if costs else None


def _needed(message: str) -> float:
    """The bytes of temporaries for which a chip has no room, from the compiler's message."""
    found = re.search(rf"\({_SIZE}\) exceeds|Used {_SIZE} of", message)
    if found is None:
        raise UserError(f"the compiler has no room, and does not say how much is missing: {message[:200]}")
    number, unit = (found[1], found[2]) if found[1] else (found[3], found[4])
    return float(number) * _UNITS[unit]


def _estimate(program: Program, config: TrainConfig, facts: DataFacts, shape: tuple[int, int, int]) -> float:
    """Gradients, and what the forward pass of one part of a chip's samples keeps for the backward pass.

    `tensor` splits activations too; that is left out, so with it the estimate is too high.
    """
    share = shape[0] * shape[1] * config.accumulate
    state, places = program.shapes, program.shardings
    key = jax.eval_shape(lambda: jax.random.key(0))

    def kept(params, constants, batch, key, own):
        def loss(params):
            return program.loss(merge(program.graphdef, params, constants), batch, key, own)[0]

        return jax.vjp(loss, params)

    batch = batch_shapes(config, facts, share=share)
    bare = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype), (state.params, state.constants))
    traced = jax.make_jaxpr(kept)(*bare, batch, key, state.gate_state)
    gradients = bytes_on_device(state.params, places.params) * (2 if config.accumulate > 1 else 1)
    return gradients + kept_bytes(traced)


def _expected_traffic(program: Program, config: TrainConfig, shape: tuple[int, int, int]) -> dict[str, Traffic]:
    """What has to move: with `fsdp`, weights are gathered for the forward and for the backward pass of every part, and
    gradients are summed to where they lie; over `data`, they are summed again. That of `tensor` is left out."""
    data, fsdp, tensor = shape
    weights, gradients = (
        sum(leaf.size for leaf in part.values()) * jnp.dtype(config.policy.dtype).itemsize / tensor
        for part in (program.shapes.weights, program.shapes.params)
    )
    moved = {}
    if fsdp > 1:
        moved["all-gather"] = Traffic(2 * config.accumulate, 2 * config.accumulate * weights)
        moved["reduce-scatter"] = Traffic(config.accumulate, config.accumulate * gradients)
    if data > 1:
        moved["all-reduce"] = Traffic(1, gradients / fsdp)
    return moved


def _model_flops(config: TrainConfig, facts: DataFacts, mesh: Any) -> float:
    """Operations of a step that computes nothing twice."""
    plain = dataclasses.replace(with_remat(config, "none"), accumulate=1)
    program = make_program(plain, facts, mesh)
    return count_flops(program.step.trace(program.shapes, batch_shapes(plain, facts, mesh)).jaxpr)


def with_remat(config: TrainConfig, remat: str) -> TrainConfig:
    """The run with this `remat` in trunk, expert and vision encoder."""
    policy = config.policy
    parts = ["trunk", "expert", *([TOWERS[policy.encoder]] if policy.encoder in TOWERS else [])]
    changed = {part: dataclasses.replace(getattr(policy, part), remat=remat) for part in parts}
    return dataclasses.replace(config, policy=dataclasses.replace(policy, **changed))


def remedies(plan: Plan, facts: DataFacts) -> list[tuple[str, Plan]]:
    """Changes that lower what a chip needs, each alone, and then together until they fit: (settings, their plan)."""
    config, (data, fsdp, _) = plan.config, plan.shape
    samples = math.gcd(config.data.batch_size * config.loss.demonstrations, config.questions.batch_size)
    # The gate of loss.gate needs the whole batch at once.
    most = 0 if config.loss.gate else 32
    parts = [n for n in (2, 4, 8, 16, 32) if n <= most and samples % (n * config.accumulate * data * fsdp) == 0]
    changes: list[tuple[str, Callable[[TrainConfig], TrainConfig]]] = []
    if with_remat(config, "all") != config:
        changes.append(("remat=all in every part of the policy", lambda c: with_remat(c, "all")))
    slices = plan.topology.slices
    if data > slices:
        mesh = dataclasses.replace(config.mesh, data=slices, fsdp=data * fsdp // slices)
        changes.append((f"mesh.data={slices} mesh.fsdp={mesh.fsdp}", lambda c: dataclasses.replace(c, mesh=mesh)))

    def accumulate(n: int) -> tuple[str, Callable[[TrainConfig], TrainConfig]]:
        count = n * config.accumulate
        return f"accumulate={count}", lambda c: dataclasses.replace(c, accumulate=count)

    alone = [*changes, *map(accumulate, parts[:1])]
    tried = [(name, make_plan(change(config), facts, plan.topology, costs=False)) for name, change in alone]
    together = config
    for _, change in changes:
        together = change(together)
    more = list(map(accumulate, parts if changes else parts[1:]))
    if len(changes) > 1:
        more.insert(0, ("", lambda c: c))
    for name, change in more:
        if any(other.fits for _, other in tried):
            break
        names = " and ".join([*(name for name, _ in changes), *([name] if name else [])])
        tried.append((names, make_plan(change(together), facts, plan.topology, costs=False)))
    return tried


def report(plan: Plan, mfu: float) -> str:
    """The plan for people."""
    memory, chip, config = plan.memory, plan.topology.chip, plan.config
    rows = {
        "parameters": memory.weights,
        "averaged weights": memory.average,
        "optimiser": memory.optimiser,
        "batch": memory.batch,
        "activations, gradients, temporaries": memory.rest,
        "all together": memory.total,
    }
    mesh = " ".join(f"{axis}={size}" for axis, size in zip(AXES, plan.shape, strict=True))
    source = "the compiler's numbers" if memory.exact else "arithmetic, nothing was compiled"
    slices = f" in {plan.topology.slices} slices" if plan.topology.slices > 1 else ""
    lines = [f"{plan.topology.count} x {plan.topology.kind}{slices}, {mesh}, {config.samples} samples a step, {source}"]
    lines += [f"  {name:<36}{in_units(size):>12}  {size / chip.memory:6.1%}" for name, size in rows.items() if size]
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    lines.append(f"{verdict}: a chip has {in_units(chip.memory)} for programs")
    if not plan.fits:
        return "\n".join(lines)
    if plan.traffic:
        lines.append("collectives a step, on each chip:" if memory.exact else "collectives a step, at least:")
        for kind, part in sorted(plan.traffic.items(), key=lambda item: -item[1].size):
            lines.append(f"  {kind:<20}{part.count:>7} x  {in_units(part.size):>12}")
    seconds = max(plan.computing(mfu), plan.moving)
    limit = "computing" if seconds > plan.moving else "moving data between chips"
    again = f" ({plan.done / plan.flops:.2f} x that with what is computed again)" if plan.flops else ""
    hours = config.steps * seconds / 3600
    lines += [
        f"operations a step: {plan.flops:.3g}{again}",
        f"step time: {seconds:.4g} s, limited by {limit}: {plan.computing(mfu):.4g} s of computing at "
        f"{mfu:.0%} of the peak, at least {plan.moving:.4g} s of links at full speed",
        f"{config.samples / seconds:.0f} examples/s; {config.steps} steps: {hours:.3g} hours, "
        f"{hours * plan.topology.count:.3g} chip-hours",
    ]
    return "\n".join(lines)
