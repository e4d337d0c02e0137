"""The training loop: the same on every device, readable on one screen."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from copy import copy
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from esm_neuron.backends.base import Backend
from esm_neuron.config import TrainConfig
from esm_neuron.data.loader import EvalLoader, StepData, TrainLoader, prefetch
from esm_neuron.distributed import from_main_rank, main_rank_only, raise_on_any_rank
from esm_neuron.errors import CheckpointError, TrainingError
from esm_neuron.metrics import Value
from esm_neuron.run_dir import NONFINITE
from esm_neuron.tasks import Task
from esm_neuron.training import checkpoint
from esm_neuron.training.callbacks import Callback, EarlyStopping, JsonlLogger
from esm_neuron.training.checkpoint import Saver, Snapshot, TrainState, load_shared
from esm_neuron.training.evaluation import evaluate, forward, on_device, run_passes
from esm_neuron.training.monitors import GIVE_UP, WARM_UP, RecompileGuard, StepWatch
from esm_neuron.training.optim import learning_rate, parameter_groups
from esm_neuron.training.signals import StopSignal
from esm_neuron.training.watchdog import Watchdog

logger = logging.getLogger(__name__)

AHEAD = 2
"""Steps whose batches are made before the device asks for them."""


@dataclass(frozen=True)
class Fit:
    """How training ended."""

    state: TrainState
    stopped_by: str | None
    """Name of the signal that asked it to end, also in its last step; None without one."""


class Trainer:
    """Trains one model on one process's device, in step with its peers."""

    def __init__(
        self,
        cfg: TrainConfig,
        model: nn.Module,
        task: Task,
        backend: Backend,
        train: TrainLoader,
        valid: EvalLoader | None,
        callbacks: Sequence[Callback],
        identity: Mapping[str, Any],
    ) -> None:
        """Make the optimizer; `identity` is what a resumed checkpoint must agree with."""
        self.cfg, self.model, self.task, self.backend = cfg, model, task, backend
        self.train_loader, self.valid_loader, self.callbacks = train, valid, callbacks
        # Loss sum and weight of the step. Made real with the optimizer's state: as zeros not yet computed, or copied
        # from the host, they would look unlike all later ones, and the first pass would be a program of its own.
        self._totals = torch.zeros(2, device=backend.device)
        self.optimizer = backend.optimizer(parameter_groups(model, cfg.optim), cfg.optim)
        self.total_steps = train.total_steps(cfg.loop.epochs, cfg.loop.max_steps)
        self.eval_every = cfg.loop.eval_every or train.steps_per_epoch
        self.save_every = cfg.checkpoint.every or self.eval_every
        self.stopper = EarlyStopping(cfg.loop.patience, task.greater_is_better)
        self.state = TrainState(run=dict(identity))
        self.folder = Path(cfg.output) / "checkpoints"
        self.saver = Saver(self.folder, cfg.checkpoint.keep, self.save_every, cfg.checkpoint.asynchronous)
        self.guard = RecompileGuard(cfg.loop.on_recompile, backend.graphs, cfg.data.pack_tokens)
        self.watch = StepWatch()
        self.watchdog = Watchdog.of(cfg, backend.topology.rank)
        self._compiles = backend.static_shapes or cfg.loop.torch_compile
        self._compiled: set[str] = set()  # what has been done once, steps apart
        self._unseen: list[tuple[int, Tensor, Tensor]] = []  # step, its totals and norm, all still on the device
        self._untold: OSError | None = None  # why a callback could not write
        self._began = self._logged_seconds = 0.0
        self._logged_residues = 0

    def restore(self) -> int:
        """Go on from the newest whole checkpoint of the run's folder, if there is one; returns its step.

        Raises:
            CheckpointError: the checkpoints belong to another run, none of them is whole, the ranks see different
                ones, or the best one cannot be read and no step is left to train.
        """
        snapshot = raise_on_any_rank(self.backend, self._newest)
        found = self.backend.gather_host(None if snapshot is None else snapshot.state.step)
        if len(set(found)) > 1:
            raise CheckpointError(
                f"{self.folder}: the ranks find different checkpoints, of steps {found}; give them one shared folder"
            )
        if snapshot is None:
            return 0
        self.backend.load_state(self.model, self.optimizer, snapshot.model, snapshot.optimizer)
        self.state = snapshot.state
        self.stopper.load_state_dict(self.state.stopper)
        self.watch.load_state_dict(self.state.watch)
        main_rank_only(self.backend, lambda: checkpoint.set_aside_after(self.folder, self.state.step))
        self._check_best()
        self._logged_seconds, self._logged_residues = self.state.seconds, self.state.residues
        return self.state.step

    def _newest(self) -> Snapshot | None:
        snapshot = checkpoint.newest(self.folder)
        if snapshot is not None:
            checkpoint.check_identity(snapshot.state.run, self.state.run, self.folder)
        return snapshot

    def _check_best(self) -> None:
        """Make sure, before training and not after it, that the best checkpoint can be put back at the end.

        One that cannot is set aside, and the best of the steps to come takes its place.

        Raises:
            CheckpointError: there are no steps to come.
        """
        done, best = self.state.step, self.stopper.best_step
        if best is None or best == done:  # the latter has just been read
            return
        folder = checkpoint.step_folder(self.folder, best)
        unusable = from_main_rank(self.backend, lambda: checkpoint.damage(folder))
        if unusable is None:
            return
        if self.stopper.stop or done == self.total_steps:
            raise CheckpointError(
                f"training is over and its best step, {best}, cannot be read: {unusable}; bring this folder back, or "
                f"train again into another --output: the weights of step {done} are not taken in its place"
            )
        main_rank_only(self.backend, lambda: checkpoint.set_aside(folder))
        logger.warning("the best step is looked for anew among those after %d: %s", done, unusable)
        self.stopper.best, self.stopper.best_step = None, None

    def fit(self) -> Fit:
        """Train from the present step to the last one, evaluating and saving on the way."""
        self.model.train()
        over = self.stopper.stop  # a resumed run that had already stopped early
        steps = range(self.state.step, self.state.step if over else self.total_steps)
        with (
            StopSignal() as stop,
            self.watchdog,
            closing(self.saver),
            closing(prefetch(map(self.train_loader.load, steps), AHEAD)) as ahead,
        ):
            self._start_clock()
            if self.cfg.loop.on_nonfinite == "rollback" and self.state.step == 0:
                self._save()  # something to go back to
            self.watchdog.expect(f"step {self.state.step + 1}")
            for data in ahead:
                if self._compiles and self.guard.warms_up(data.batches):
                    self.watchdog.expect(f"step {data.step + 1}", slow=True)
                self.guard.begin()
                self._train_step(data)
                self.guard.end(data.step, data.batches)
                done = self.state.step
                last = done == self.total_steps
                if self._looks_after(done):
                    self._answer_nonfinite()
                if done % self.eval_every == 0 or last:
                    self._validate()
                ends = self._asked_to_stop(stop) is not None or last or self.stopper.stop
                if done % self.save_every == 0 or self.stopper.best_step == done or ends:
                    self._save()
                if ends:
                    main_rank_only(self.backend, self.saver.settle)
                    return Fit(self.state, self._asked_to_stop(stop))
                self.watchdog.expect(f"step {done + 1}")
            return Fit(self.state, self._asked_to_stop(stop))

    def _asked_to_stop(self, stop: StopSignal) -> str | None:
        """The signal that any rank has received so far.

        Raises:
            OSError: what a callback of the main rank met since the last time; raised on every rank.
        """
        heard = self.backend.gather_host((stop.received, self._untold))
        failure = next((error for _, error in heard if error is not None), None)
        if failure is not None:
            raise failure
        found = next((name for name, _ in heard if name is not None), None)
        stop.answered = found is not None
        return found

    def compile(self, held_out: Sequence[EvalLoader]) -> None:
        """Run every graph of a run: its first training step twice, and one pass of each evaluation.

        By the code that trains, so that the programs are the same; no value is looked at and nothing is written, since
        under neuron_parallel_compile every value is 0. The model is of no use afterwards.
        """
        self.model.train()
        for _ in range(WARM_UP):  # the first steps of a run may differ from all others
            self._train_step(self.train_loader.load(0))
        for loader in held_out:
            first = islice(loader, 1)
            run_passes(self.model, self.task, self.backend, first, lambda members, predictions: None)

    def _train_step(self, data: StepData) -> None:
        """One optimizer step: a pass a batch, then the update. Nothing here waits for a value from the device."""
        step = data.step
        rate = learning_rate(step, self.total_steps, self.cfg.optim)
        self.backend.set_lr(self.optimizer, rate)
        for number, batch in enumerate(on_device(data.batches, self.backend)):
            self.backend.seed(self.cfg.seed, step, number)
            with self.backend.autocast():
                loss, weight = self.task.loss(forward(self.model, batch), batch)
            loss.backward()
            self._totals += torch.stack((loss.detach(), weight))
            self.backend.sync()
        totals = self._totals.clone()
        norm = self.backend.step(self.model, self.optimizer, totals, self.cfg.optim.max_grad_norm)
        self._totals.zero_()
        self.state.residues += data.residues
        self.state.step = step + 1
        self._unseen.append((step + 1, totals, norm))
        if self._looks_after(step + 1):
            self._look()
        if (step + 1) % self.cfg.log.every == 0 or step + 1 == self.total_steps:
            self.backend.on_host(partial(self._log, step + 1, rate), totals, norm)
        self.backend.sync()

    def _looks_after(self, step: int) -> bool:
        """Whether the host looks at the losses up to `step`: where it waits for the device anyway."""
        return step == self.total_steps or not all(
            step % every for every in (self.cfg.log.every, self.eval_every, self.save_every)
        )

    def _look(self) -> None:
        """Have the values of all steps since the last look taken in, once they are there."""
        unseen, self._unseen = self._unseen, []
        steps, totals, norms = zip(*unseen, strict=True)

        def take_in(*values: Tensor) -> None:
            for step, sums, norm in zip(steps, values[: len(steps)], values[len(steps) :], strict=True):
                self.watch.take_in(step, _mean(sums), float(norm))

        self.backend.on_host(take_in, *totals, *norms)

    def _answer_nonfinite(self) -> None:
        """Name the records of steps that were not finite, and go on or not, as `loop.on_nonfinite` says.

        Raises:
            TrainingError: it says stop, or there are too many in a row.
        """
        found, action = self.watch.taken(), self.cfg.loop.on_nonfinite
        if not found:
            return
        path, first, in_a_row = Path(self.cfg.output) / NONFINITE, found[0], self.watch.in_a_row
        stops = action == "stop" or in_a_row >= GIVE_UP
        main_rank_only(self.backend, lambda: self._name_records(path, found, "stop" if stops else action))
        what = f"step {first['step']}: the loss is {first['loss']} and the gradient's norm {first['grad_norm']}"
        many = f" ({in_a_row} such steps in a row)" if in_a_row > 1 else ""
        if stops:
            cure = "" if action != "stop" else "; or go on without such steps: --loop.on_nonfinite skip"
            raise TrainingError(
                f"{what}{many}; its records are in {path}; lower optim.lr={self.cfg.optim.lr}, or clip by "
                f"optim.max_grad_norm{cure}"
            )
        if action == "rollback":
            many += f"; the weights are those after step {self._roll_back()} again"
        logger.warning("%s%s; left out, see %s", what, many, path)

    def _name_records(self, path: Path, found: Sequence[Mapping[str, Any]], action: str) -> None:
        lines = JsonlLogger(path)
        for step in found:
            ids = self.train_loader.record_ids(step["step"] - 1)
            lines.on_log(step["step"], self.total_steps, {**step, "action": action, "ids": ids})

    def _roll_back(self) -> int:
        """Put weights and moments of the newest regular checkpoint back, and go on after this step; returns its step.

        What the best step, or a signal, had saved in between is taken only if there is no other, as after a change of
        `checkpoint.every`: a run that was stopped and one that was not must go back to the same.
        """

        def find() -> int:
            self.saver.settle()
            snapshot = checkpoint.newest(self.folder, self.save_every)
            if snapshot is None:
                raise CheckpointError(f"{self.folder}: there is no checkpoint left to go back to")
            return snapshot.state.step

        snapshot = load_shared(self.backend, self.folder, from_main_rank(self.backend, find), lambda snapshot: snapshot)
        self.backend.load_state(self.model, self.optimizer, snapshot.model, snapshot.optimizer)
        self.guard.weights_were_given()
        return snapshot.state.step

    def _log(self, step: int, rate: float, totals: Tensor, norm: Tensor) -> None:
        self._stop_clock()
        seconds, residues = self.state.seconds - self._logged_seconds, self.state.residues - self._logged_residues
        self._logged_seconds, self._logged_residues = self.state.seconds, self.state.residues
        record = {
            "loss": _mean(totals),
            "lr": rate,
            "grad_norm": float(norm),
            "residues_per_second": residues / seconds,
            "graphs": self.backend.graphs(),
        }
        if self.watch.spikes:
            record["loss_spikes"], self.watch.spikes = self.watch.spikes, 0
        peak = self.backend.peak_memory()
        if peak is not None:
            record["peak_memory_gb"] = peak / 1e9
        self._tell(lambda callback: callback.on_log(step, self.total_steps, record))
        self._start_clock()

    def _tell(self, what: Callable[[Callback], None]) -> None:
        """Tell the callbacks; a disk that does not take it is an error of all ranks when they next ask for signals."""
        try:
            for callback in self.callbacks:
                what(callback)
        except OSError as error:
            self._untold = self._untold or error

    def _validate(self) -> None:
        if self.valid_loader is None:
            return
        self._stop_clock()
        self._expect("evaluation", len(self.valid_loader) + 1)
        self.guard.begin()
        values = self.evaluate(self.valid_loader)
        watched = values[self.task.metric]
        self.stopper.update(watched if isinstance(watched, (int, float)) else None, self.state.step)
        self._tell(lambda callback: callback.on_eval(self.state.step, {"split": "valid", **values}))
        self.guard.end_validation(self.state.step)
        self._start_clock()

    def evaluate(self, loader: EvalLoader) -> dict[str, Value]:
        """The figures of a loader's table over all ranks."""
        return evaluate(self.model, self.task, self.backend, loader)

    def load_best(self) -> tuple[int, dict[str, Tensor]]:
        """Put the weights of the best validated step back, where there is one.

        Returns:
            The step of the weights, and the trained ones, whole (on the main rank). Not to be gathered again: under
            ZeRO-1 the optimizer's master copies, which `Backend.gather_state` reads, are still those of the last step.
        """
        best = self.stopper.best_step
        if best is None or best == self.state.step:
            return self.state.step, self.backend.gather_state(self.model, self.optimizer)[0]
        weights = load_shared(self.backend, self.folder, best, lambda snapshot: snapshot.model)
        self.backend.load_weights(self.model, weights)
        return best, weights

    def _save(self) -> None:
        """Write a checkpoint from rank 0; every rank learns whether it worked, or whether the one before did."""
        self._stop_clock()
        self._expect("checkpoint")
        if self._unseen:  # a stop between two looks
            self._look()
            self.backend.sync()
        if self.cfg.checkpoint.asynchronous:
            main_rank_only(self.backend, self.saver.settle)
        self.state.stopper, self.state.watch = self.stopper.state_dict(), self.watch.state_dict()
        weights, moments = self.backend.gather_state(self.model, self.optimizer)
        snapshot = Snapshot(copy(self.state), weights, moments)
        main_rank_only(self.backend, lambda: self.saver.save(snapshot, self.stopper.best_step))
        self._start_clock()

    def _expect(self, what: str, units: int = 1) -> None:
        """Have the watchdog expect an evaluation or a checkpoint; the first one of a process may compile."""
        first = what not in self._compiled
        self._compiled.add(what)
        self.watchdog.expect(f"the {what} after step {self.state.step}", units, slow=self._compiles and first)

    def _start_clock(self) -> None:
        self._began = time.perf_counter()

    def _stop_clock(self) -> None:
        self.state.seconds += time.perf_counter() - self._began


def _mean(totals: Tensor) -> float | None:
    """Mean loss of a step from [loss sum, weight] on the host; None where nothing was to be learnt."""
    loss, weight = totals.tolist()
    return loss / weight if weight else None
