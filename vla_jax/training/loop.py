"""The training loop, in a fixed order.

    restore        (by the caller: `trainer.train`)
    for every step:
      1 data       wait for the next batch and place it on the devices
      2 step       start the update; it runs while the previous one is looked at
      3 guard      the previous step's loss and gradient are finite, or the run stops and names the batch
      4 log        every `log_every`: means since the last line; a weighted term that no sample carried is an error
      5 validate   every `validate_every`: loss on held-out episodes, with the averaged weights
      6 evaluate   every `eval_every` and at the end: closed loop, with the averaged weights
      7 checkpoint every `checkpoint_every` and at the end: state and data position, after 3, so never a bad state
      8 stop       after Ctrl-C or SIGTERM: checkpoint, say how to resume, leave (with status 0 after SIGTERM)

A checkpoint at step k holds k updates and the data position after k batches; the randomness of a step is a function of
the run's key and its number. So a resumed run takes exactly the steps that an uninterrupted one would have taken.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import numpy as np
from tqdm import tqdm

from vla_jax.errors import UserError
from vla_jax.losses.term import check_terms
from vla_jax.platform import any_process, is_first
from vla_jax.training.checkpoints import Checkpoints
from vla_jax.training.metrics import Means, MetricsWriter, Stopwatch
from vla_jax.training.signals import StopRequest
from vla_jax.training.state import TrainState
from vla_jax.training.train_config import TrainConfig

Batch = dict[str, Any]
STOP_EVERY = 8  # steps after which several processes ask each other, as the answer waits until the devices are idle
BAR = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"


class Stopped(KeyboardInterrupt):
    """The run was asked to stop; its state is saved. status: of the process, 0 after SIGTERM, 130 after Ctrl-C."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


class Data(Protocol):
    """An endless stream of batches that knows its position."""

    def __next__(self) -> Batch: ...

    def get_state(self) -> dict[str, Any]:
        """The position, JSON-able."""


class Loop:
    """One training run from its (restored) state to its last step."""

    def __init__(
        self,
        config: TrainConfig,
        state: TrainState,
        step_fn: Callable[[TrainState, Batch], tuple[TrainState, dict]],
        data: Data,
        checkpoints: Checkpoints,
        writer: MetricsWriter,
        *,
        place: Callable[[Batch], Batch] = lambda batch: batch,
        validate: Callable[[TrainState], dict[str, float]] | None = None,
        evaluate: Callable[[TrainState, int], list[dict[str, Any]]] | None = None,
        meta: dict[str, Any] | None = None,
        evaluated: int = 0,
        resume_command: str = "",
    ):
        """
        Args:
            step_fn: of `step.make_step`.
            data: host batches; `episode` and `step` name the samples and stay on the host.
            place: puts a host batch on the devices.
            validate: held-out losses by name.
            evaluate: rows of closed-loop results; called between steps.
            meta: saved with every checkpoint.
            evaluated: the step of the last evaluation.
            resume_command: what the user is told to type.
        """
        self.config, self.state, self.step = config, state, int(state.step)
        self._step_fn, self._data, self._place = step_fn, data, place
        self._checkpoints, self._writer = checkpoints, writer
        self._validate, self._evaluate = validate, evaluate
        self._meta, self._evaluated, self._resume_command = meta or {}, evaluated, resume_command
        self._pending: tuple[int, Batch, dict] | None = None
        self._means, self._watch = Means(), Stopwatch()
        self._stop, self._agreed, self._evaluation_seconds = StopRequest(), False, 0.0
        self._stop_every = STOP_EVERY if jax.process_count() > 1 else 1
        self._compiled = False  # the first call of step_fn says nothing of the pace

    def run(self) -> TrainState:
        """Trains to the last step and returns the state.

        Raises:
            Stopped: after Ctrl-C or SIGTERM; the state is saved.
            UserError: a loss that is not finite, a term that no sample carried, a full disk.
        """
        steps = self.config.steps
        hidden = None if is_first() else True  # None: where there is no terminal
        bar = tqdm(total=steps, initial=self.step, desc=self.config.arm, disable=hidden, bar_format=BAR)
        with self._stop, bar:
            if 0 < self.step and self._due(self.config.eval_every):
                self._run_evaluation(bar)  # the run was stopped while this evaluation was going on
            while self.step < steps and not self._stopping(self.step % self._stop_every == 0):
                self._take_step()
                bar.update()
                self._between_steps(bar)
            self._save(wait=True)
            if self._stop.requested and (self.step < steps or self._evaluation_missing()):
                hint = f"; go on with: {self._resume_command}" if self._resume_command and is_first() else ""
                raise Stopped(f"saved step {self.step} of {steps}{hint}", self._stop.status)
        return self.state

    def _stopping(self, ask: bool = True) -> bool:
        """Whether to stop: all processes of a run, as soon as one is asked to; they have to ask this together."""
        if ask and not self._agreed:  # what is asked of this process meanwhile, it says the next time
            self._agreed = any_process(self._stop.requested)
            if self._agreed:
                self._stop.requested = True
        return self._agreed

    def _take_step(self) -> None:
        with self._watch.phase("data"):
            batch = next(self._data)
            names = {name: batch[name] for name in ("episode", "step") if name in batch}
            placed = self._place({name: value for name, value in batch.items() if name not in names})
        with self._watch.phase("step" if self._compiled else "compile"):
            self.state, metrics = self._step_fn(self.state, placed)
        self._compiled = True
        with self._watch.phase("step"):
            self.step += 1
            previous, self._pending = self._pending, (self.step, batch, metrics)
            if previous is not None:
                self._settle(*previous)

    def _settle(self, step: int, batch: Batch, metrics: dict) -> None:
        """Waits for a step's numbers, guards them and adds them to the means."""
        metrics = jax.device_get(metrics)
        if not math.isfinite(metrics["loss"]) or not math.isfinite(metrics["grad_norm"]):
            raise UserError(self._not_finite(step, batch, metrics))
        self._means.add(metrics)

    def _between_steps(self, bar: tqdm) -> None:
        config = self.config
        # The first line comes at once: a loss that nothing carries should not train until the second.
        log = self.step == 1 or self._due(config.log_every)
        validate = self._validate is not None and self._due(config.validate_every)
        evaluate = self._evaluate is not None and self._due(config.eval_every)
        save = self._due(config.checkpoint_every)
        # Both are work of all processes together: either all begin it or none.
        stop = (validate or evaluate) and self._stopping()
        if log or validate or evaluate or save or self._stop.requested:
            with self._watch.phase("step"):
                self._settle(*self._pending)
                self._pending = None
        if log:
            self._log(bar)
        if validate and not stop:
            with self._watch.phase("eval"):
                self._writer.write("validation", self.step, self._validate(self.state))
        if evaluate and not stop:
            self._run_evaluation(bar)
        if save:
            self._save()

    def _due(self, every: int) -> bool:
        return every > 0 and (self.step % every == 0 or self.step == self.config.steps)

    def _log(self, bar: tqdm) -> None:
        check_terms(self._means.terms())
        values, shares = self._means.values(), self._watch.shares()
        per_step = self._watch.sum("data", "step") / self._means.steps
        values |= {f"time/{name}": share for name, share in shares.items()}
        values["samples_per_second"] = self.config.samples / per_step
        self._writer.write("train", self.step, values)
        split = " ".join(f"{name} {share:.0%}" for name, share in shares.items())
        text = f"loss {values['loss']:.4f}  {split}  left {tqdm.format_interval(self._seconds_left(per_step))}"
        bar.set_postfix_str(text)
        if bar.disable:  # not a terminal: a line instead of a bar
            print(f"step {self.step}/{self.config.steps}  {text}", flush=True)
        self._means, self._watch = Means(), Stopwatch()

    def _seconds_left(self, per_step: float) -> float:
        """Steps at the present pace, and evaluations as long as the last one."""
        left, every = self.config.steps - self.step, self.config.eval_every
        evaluations = -(-left // every) if self._evaluate is not None and every else 0
        return left * per_step + evaluations * self._evaluation_seconds

    def _run_evaluation(self, bar: tqdm) -> None:
        if not self._evaluation_missing():
            return
        bar.set_description_str(f"{self.config.arm}: evaluating")
        before = self._watch.sum("eval")
        try:
            with self._watch.phase("eval"), self._stop.interruptible():
                rows = self._evaluate(self.state, self.step)
        except KeyboardInterrupt:
            if not self._stop.requested:
                raise
            return
        finally:
            bar.set_description_str(self.config.arm)
        for row in rows:
            self._writer.write("evaluation", self.step, row)
        self._evaluated = self.step
        self._evaluation_seconds = self._watch.sum("eval") - before

    def _evaluation_missing(self) -> bool:
        return self._evaluate is not None and self._due(self.config.eval_every) and self._evaluated < self.step

    def _save(self, wait: bool = False) -> None:
        with self._watch.phase("save"):
            meta = {"data": self._data.get_state(), "evaluated": self._evaluated, **self._meta}
            self._checkpoints.save(self.step, self.state, meta)
            if wait:
                self._checkpoints.wait()

    def _not_finite(self, step: int, batch: Batch, metrics: dict) -> str:
        parts = {"loss": metrics["loss"], "gradient": metrics["grad_norm"]}
        parts |= {f"term {name}": term[0] for name, term in metrics["terms"].items()}
        bad = [name for name, value in parts.items() if not math.isfinite(value)]
        self._checkpoints.wait()  # the message names a checkpoint only if it is whole
        saved = self._checkpoints.steps
        last = f"the last good checkpoint is step {saved[-1]}" if saved else "there is no checkpoint yet"
        return (
            f"not finite at step {step}: {', '.join(bad)}; the batch was (episode:step) {name_samples(batch)}; {last}. "
            "Repair these samples, or lower optimizer.learning_rate, and train in another --workdir: --resume keeps "
            "data and settings, and meets the same batch"
        )


def name_samples(batch: Batch, most: int = 16) -> str:
    """The samples of a batch as "episode:step"; those with numbers that are not finite alone, where there are any."""
    count = len(batch["episode"])
    bad = np.zeros(count, bool)
    for leaf in jax.tree.leaves(batch):
        if np.issubdtype(leaf.dtype, np.floating):
            bad |= ~np.isfinite(leaf.reshape(count, -1)).all(axis=1)
    rows = np.flatnonzero(bad) if bad.any() else np.arange(count)
    names = [f"{batch['episode'][row]}:{batch['step'][row]}" for row in rows[:most]]
    more = f" and {len(rows) - most} more" if len(rows) > most else ""
    return ", ".join(names) + more + (" (numbers that are not finite in the data)" if bad.any() else "")


def mean_losses(losses: Iterator[dict[str, Any]]) -> dict[str, float]:
    """Means of {"loss", "terms"} over batches, by name as in the training lines."""
    means = Means()
    for values in losses:
        means.add(jax.device_get(values))
    return means.values()


def first(data: Data, count: int) -> list[Batch]:
    """The next `count` batches."""
    return list(itertools.islice(iter(data), count))
