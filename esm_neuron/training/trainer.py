"""The training loop: the same on every device, readable on one screen."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from esm_neuron.backends.base import Backend, Named, state_of
from esm_neuron.config import TrainConfig
from esm_neuron.data.dataset import Batch
from esm_neuron.data.loader import EvalLoader, StepData, TrainLoader, eval_interval, prefetch, total_steps
from esm_neuron.metrics import Value
from esm_neuron.tasks.base import Task
from esm_neuron.training.callbacks import Callback, EarlyStopping
from esm_neuron.training.checkpoint import CheckpointManager, TrainState
from esm_neuron.training.evaluation import AHEAD, Evaluator, forward, on_device
from esm_neuron.training.monitors import WARM_UP, Monitors, mean_loss
from esm_neuron.training.optim import learning_rate, parameter_groups


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
        self._callback_failure: OSError | None = None
        # Loss sum and weight of the step. Made real with the optimizer's state: as zeros not yet computed, or copied
        # from the host, they would look unlike all later ones, and the first pass would be a graph of its own.
        self._totals = torch.zeros(2, device=backend.device)
        self.optimizer = backend.optimizer(model, parameter_groups(model, cfg.optim), cfg.optim)
        self._run_pass = backend.graph(self._pass, self._state)
        self._run_update = backend.graph(self._update, self._state)
        self.evaluator = Evaluator(model, task, backend)
        self.total_steps = total_steps(train.steps_per_epoch, cfg.loop)
        self.eval_every = eval_interval(train.steps_per_epoch, cfg.loop)
        self.save_every = cfg.checkpoint.every or self.eval_every
        self.state = TrainState(run=dict(identity))
        self.early_stopping = EarlyStopping(cfg.loop.patience, task.greater_is_better)
        self.checkpoints = CheckpointManager(cfg, backend, model, self.optimizer)
        self.monitors = Monitors(cfg, backend, train)
        self.best_predictions: tuple[int, list[np.ndarray]] | None = None
        """The best step that was validated since this process began, and its predictions for validation records."""
        self._predictions: list[np.ndarray] = []

    def fit(self) -> str | None:
        """Train from the current step to the last one, validating and saving on the way.

        Return the name of the signal that asked it to end, also in its last step; None without one.
        """
        self.model.train()
        with self.monitors.watching(), closing(self.checkpoints), closing(self.prefetched_steps()) as steps:
            for data in steps:
                with self.monitors.step(data):  # a time limit, and no unplanned graph
                    self.train_step(data)
                step = self.state.step
                last = step == self.total_steps
                if self.host_sync_due(step):
                    self.monitors.handle_nonfinite_steps()
                if step % self.eval_every == 0 or last:
                    self.validate()
                # Asking goes over the hosts' network, so not every step does.
                asks = self.host_sync_due(step) or self.monitors.signal.round_due(step)
                done = (asks and self.stop_requested() is not None) or last or self.early_stopping.stop
                if step % self.save_every == 0 or self.early_stopping.best_step == step or done:
                    self.save_checkpoint()
                if done:
                    break
            self.checkpoints.wait()  # every rank raises if the last write failed
            return self.stop_requested()

    def train_step(self, data: StepData) -> None:
        """Do one optimizer step: a pass per batch, then the update. Nothing here waits for a value of the device."""
        step, lr = data.step, learning_rate(data.step, self.total_steps, self.cfg.optim)
        self.backend.set_lr(self.optimizer, lr)
        for number, batch in enumerate(on_device(data.batches, self.backend)):
            self.backend.seed(self.cfg.seed, step, number)
            self._run_pass(batch)
        totals, norm = self._run_update()
        self.state.residues += data.residues
        self.state.step = step + 1
        self.monitors.note(step + 1, totals, norm)
        if self.host_sync_due(step + 1):
            self.monitors.look()
        if (step + 1) % self.cfg.log.every == 0 or step + 1 == self.total_steps:
            self.backend.on_host(partial(self._log, step + 1, lr), totals, norm)
        self.backend.sync()

    # The two graphs of a step. Their Python may run once only (`Backend.graph`): they compute, and do nothing else.

    def _pass(self, batch: Batch) -> tuple[Tensor, ...]:
        with self.backend.autocast():
            loss, weight = self.task.loss(forward(self.model, batch), batch)
        self.backend.backward(self.model, loss)
        self._totals += torch.stack((loss.detach(), weight))  # sums, so that passes and ranks add up exactly
        return ()

    def _update(self) -> tuple[Tensor, ...]:
        totals = self._totals.clone()  # summed over the ranks by the update, and logged after the buffer is zeroed
        norm = self.backend.step(self.model, self.optimizer, totals, self.cfg.optim.max_grad_norm)
        self._totals.zero_()
        return totals, norm

    def _state(self) -> Named:
        yield "totals", self._totals
        yield from state_of(self.model, self.optimizer)

    def prefetched_steps(self) -> Generator[StepData, None, None]:
        """Yield the batches of the steps to come, made ahead in a thread; the watchdog times the wait for each."""
        # a resumed run that had already stopped early has no steps to come
        steps = range(self.state.step, self.state.step if self.early_stopping.stop else self.total_steps)
        with closing(prefetch(map(self.train_loader.load, steps), AHEAD)) as ahead:
            for step in steps:
                self.monitors.watchdog.expect(f"step {step + 1}")
                yield next(ahead)

    def host_sync_due(self, step: int) -> bool:
        """Return whether the host takes in the losses up to `step`: where it waits for the device anyway."""
        return step == self.total_steps or not all(
            step % every for every in (self.cfg.log.every, self.eval_every, self.save_every)
        )

    def stop_requested(self) -> str | None:
        """Return the name of the signal that any rank has received so far, None without one.

        Raise on every rank the OSError of a callback of the main rank that could not write.
        """
        # All ranks must leave the loop after the same step, and so ask each other again after the same step.
        signal, step = self.monitors.signal, self.state.step
        heard = self.backend.gather_host((signal.received, self._callback_failure, signal.pace(step)))
        signal.plan_round(step, max(pace for *_, pace in heard))
        failure = next((error for _, error, _ in heard if error is not None), None)
        if failure is not None:
            raise failure
        found = next((name for name, *_ in heard if name is not None), None)
        signal.answered = found is not None
        return found

    def validate(self) -> None:
        """Evaluate the validation split, where there is one, and update early stopping."""
        if self.valid_loader is None:
            return
        step = self.state.step
        with self.monitors.validation(step, self.valid_loader):
            metrics = self.evaluate(self.valid_loader)
            watched, loss = (
                value if isinstance(value, (int, float)) else None
                for value in (metrics[self.task.metric], metrics.get("loss"))
            )
            if self.early_stopping.update(watched, step, loss):
                self.best_predictions = (step, self._predictions)
            self._predictions = []
            self._tell(lambda callback: callback.on_eval(step, {"split": "valid", **metrics}))

    def evaluate(self, loader: EvalLoader) -> dict[str, Value]:
        self._predictions = self.evaluator.collect(loader)
        return self.task.metrics(loader.table, self._predictions)

    def save_checkpoint(self) -> None:
        """Write a checkpoint; every rank learns whether it worked, or whether the one before did."""
        with self.monitors.pause("checkpoint", self.state.step):
            # Losses still on the device belong to the state: without them a resumed run would watch other losses.
            self.monitors.flush()
            self.state.seconds = self.monitors.clock.seconds
            self.state.stopper = self.early_stopping.state_dict()
            self.state.watch = self.monitors.losses.state_dict()
            self.checkpoints.save(self.state, self.early_stopping.best_step)

    def restore(self) -> int:
        """Go on from the newest whole checkpoint of the run's folder, if there is one; return its step."""
        state = self.checkpoints.restore(self.state.run)
        if state is None:
            return 0
        self.state = state
        self.early_stopping.load_state_dict(state.stopper)
        self.monitors.resume(state)
        over = self.early_stopping.stop or state.step == self.total_steps
        if self.checkpoints.set_aside_unusable(state.step, self.early_stopping.best_step, over):
            self.early_stopping.forget()
        return state.step

    def compile(self, held_out: Sequence[EvalLoader]) -> None:
        """Run every graph of a run: its first training step twice, and one pass of each evaluation.

        The code that trains runs them, so that the graphs are the same. No value is looked at and nothing is written,
        since under neuron_parallel_compile every value is 0. The model is of no use afterwards.
        """
        self.model.train()
        for _ in range(WARM_UP):  # the first steps of a run may differ from all others
            self.train_step(self.train_loader.load(0))
        for loader in held_out:
            first = islice(loader, 1)
            self.evaluator.run(first, lambda members, predictions: None)

    def _log(self, step: int, lr: float, totals: Tensor, norm: Tensor) -> None:
        self.monitors.clock.stop()
        more = self.monitors.metrics(self.state.residues)
        record = {"loss": mean_loss(totals), "lr": lr, "grad_norm": float(norm), **more}
        self._tell(lambda callback: callback.on_log(step, self.total_steps, record))
        self.monitors.clock.start()

    def _tell(self, what: Callable[[Callback], None]) -> None:
        # A disk that is full must not end this rank alone, while its peers wait in a collective: `stop_requested`
        # raises the error on all of them.
        try:
            for callback in self.callbacks:
                what(callback)
        except OSError as error:
            self._callback_failure = self._callback_failure or error
