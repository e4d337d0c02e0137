"""Where results are kept besides metrics.jsonl: TensorBoard, Weights & Biases, MLflow.

We tell W&B and MLflow settings, metrics, the result and its report. They are imported only where a setting asks for
them. What fails in them is one warning: the run goes on without.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from pathlib import Path
from time import time
from typing import TYPE_CHECKING, Any, ClassVar

from esm_neuron.config import LogConfig, TrainConfig, require
from esm_neuron.config.settings import plain
from esm_neuron.errors import ConfigError, first_line
from esm_neuron.files import note, write_json
from esm_neuron.redact import redact
from esm_neuron.run_dir import CONFIG, REPORT, RESULT, TRACKERS, read_trackers
from esm_neuron.training.callbacks import Callback, MetricsLine

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger(__name__)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Put the path into an error of the file system, which does not always name it."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


class TensorBoardLogger(Callback):
    """Write scalars for TensorBoard: `train/<name>` per logged step, `<split>/<name>` per evaluation."""

    def __init__(self, folder: Path, start: int = 0) -> None:
        """Write event files under `folder`; a viewer hides what an earlier run wrote there after step `start`."""
        self.folder, self._start = folder, start

    @cached_property
    def writer(self) -> SummaryWriter:
        from torch.utils.tensorboard import SummaryWriter  # a second, which the first step does not wait for

        return SummaryWriter(str(self.folder), purge_step=self._start + 1 if self._start else None)

    def on_log(self, step: int, total: int, record: MetricsLine) -> None:
        self._scalars("train", step, record)

    def on_eval(self, step: int, record: MetricsLine) -> None:
        self._scalars(str(record["split"]), step, record)

    def on_end(self, result: MetricsLine) -> None:
        """Close the event file. A full disk is only logged: the result of the run, or why it ended, matters more."""
        try:
            self.writer.close()
        except OSError as error:
            logger.warning("%s: the last values could not be written (%s)", self.folder, error.strerror)

    def _scalars(self, group: str, step: int, record: MetricsLine) -> None:
        with _naming(self.folder):
            for name, value in _numbers(group, record).items():
                self.writer.add_scalar(name, value, step)
            self.writer.flush()


def _numbers(group: str, record: MetricsLine) -> dict[str, float]:
    """Return the numbers of a record by `group/name`; intervals and undefined values are left to metrics.jsonl."""
    return {f"{group}/{name}": value for name, value in record.items() if isinstance(value, (int, float))}


def check(cfg: LogConfig) -> None:
    """Raise ConfigError where a tracker that is asked for is not installed, or has nowhere to write to."""
    for name in ("wandb", "mlflow"):
        require(
            not getattr(cfg, name) or _has(name),
            f"log.{name}={getattr(cfg, name)} needs {name}; run: pip install 'esm-neuron[{name}]'",
        )
    # without a server MLflow keeps runs in a database, for which its small package lacks the library
    require(
        not cfg.mlflow or bool(os.environ.get("MLFLOW_TRACKING_URI")) or _has("sqlalchemy"),
        f"log.mlflow={cfg.mlflow}: MLFLOW_TRACKING_URI names no server; set it, such as http://127.0.0.1:5000, or run: "
        "pip install mlflow",
    )


def _has(name: str) -> bool:
    found = importlib.util.find_spec(name)
    return found is not None and found.origin is not None  # W&B's own folder ./wandb is found too, and has no origin


def trackers(cfg: TrainConfig, log: Callable[[str], None]) -> list[Tracker]:
    """Return the trackers that `cfg` asks for, as far as they can be reached; they go on with the run in its folder.

    Raise ConfigError where one refuses its settings, has no key or cannot be imported; what has begun is ended then.
    """
    path = Path(cfg.output) / TRACKERS
    known = read_trackers(path.parent) if cfg.checkpoint.resume == "auto" else {}
    begun: list[Tracker] = []
    try:
        for kind in (WandbTracker, MlflowTracker):
            if not (to := getattr(cfg.log, kind.name)):
                continue
            begun.append(tracker := kind(cfg, to))
            earlier = known.get(kind.name, {})
            goes_on = earlier.get("id") if earlier.get("to") == to else None
            cure = f"to begin a new run there when it is resumed, take {kind.name!r} out of {path}" if goes_on else ""
            tracker.attempt(partial(_begin, tracker, goes_on), cure)
            if tracker.failed:
                begun.pop().abandon()
                continue
            known[kind.name] = {"id": tracker.id, "to": to, "url": tracker.url}
            note(path.parent, [TRACKERS])
            write_json(path, known)
            log(f"log.{kind.name}: {tracker.place()}")
    except BaseException:
        for each in begun:
            each.abandon()
        raise
    return begun


def _begin(tracker: Tracker, known: str | None) -> None:
    try:
        tracker.begin(known)
    except ImportError as error:
        cure = f"install {tracker.name} anew, or leave the setting out"
        raise ConfigError(
            f"log.{tracker.name}={tracker.to}: cannot be imported ({first_line(error)}); {cure}"
        ) from error


class Tracker(Callback):
    """A service that keeps runs."""

    name: str
    """Of its package and its setting."""

    def __init__(self, cfg: TrainConfig, to: str) -> None:
        """Report on the run of `cfg` to the project `to`; `begin` does."""
        self.cfg, self.to, self.out = cfg, to, Path(cfg.output)
        self.id: str | None = None
        self.url: str | None = None
        self.failed = False

    def begin(self, known: str | None) -> None:
        """Make a run there, or go on with the one whose id is `known`; set `id`, as soon as there is one, and `url`."""
        raise NotImplementedError

    def put(self, numbers: Mapping[str, float], step: int) -> None:
        """Send numbers by `group/name` of a step."""
        raise NotImplementedError

    def finish(self, result: MetricsLine, status: str) -> None:
        """Send the result, empty where there is none, and end the run there as FINISHED, FAILED or KILLED."""
        raise NotImplementedError

    def place(self) -> str:
        """Return where the run is seen."""
        return str(self.url)

    def on_log(self, step: int, total: int, record: MetricsLine) -> None:
        self.attempt(lambda: self.put(_numbers("train", record), step))

    def on_eval(self, step: int, record: MetricsLine) -> None:
        self.attempt(lambda: self.put(_numbers(str(record["split"]), record), step))

    def on_end(self, result: MetricsLine) -> None:
        stopped = "KILLED" if sys.exc_info()[0] is None else "FAILED"  # by a signal; by an error that is on its way
        self.attempt(lambda: self.finish(result, "FINISHED" if result else stopped))

    def abandon(self) -> None:
        """End a run there that has begun, as far as it has, as FAILED."""
        if self.id is not None:
            self.failed = False  # what is left to do is tried
            with suppress(Exception):
                self.finish({}, "FAILED")

    def attempt(self, action: Callable[[], None], cure: str = "") -> None:
        """Do something there; whatever fails is a warning, the first time, and no end of the run."""
        try:
            action()
        except ConfigError:
            raise
        except Exception as error:
            if not self.failed:  # the address in its text may hold a password, and Python's own log hides none
                where, why = f"log.{self.name}={self.to}", redact(first_line(error))
                more = f"; {cure}" if cure else ""
                logger.warning("%s failed (%s); the run goes on, metrics.jsonl has it all%s", where, why, more)
            self.failed = True

    def run_name(self) -> str:
        """Return what the run is called there: its folder, of one of several with the folder that they are in."""
        parts = self.out.resolve().parts
        return "/".join(parts[-2:] if parts[-1].startswith(("fold-", "seed-")) else parts[-1:])

    def page(self) -> Path:
        """Write the report of the finished run; return its page."""
        from esm_neuron.reports import write_report

        return write_report(self.out)


def _final(result: MetricsLine) -> dict[str, float]:
    """Return the metrics of the chosen step, as `final/valid/mcc`."""
    splits = [_numbers(f"final/{split}", result.get(split) or {}) for split in ("valid", "test")]
    return {name: value for split in splits for name, value in split.items()}


class WandbTracker(Tracker):
    """A run of Weights & Biases; WANDB_MODE, WANDB_API_KEY and its other variables have their usual meaning.

    Its own process sends what it is told, and waits for a server that is away.
    """

    name = "wandb"
    WAIT = 120.0
    """Seconds that the end of a run waits for what is not sent yet; it lies under `output`/wandb for `wandb sync`."""

    def begin(self, known: str | None) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb
        from wandb.errors import AuthenticationError, UsageError

        given: dict[str, Any] = {"silent": True, "console": os.environ.get("WANDB_CONSOLE", "off"), "save_code": False}
        if "finish_timeout" in wandb.Settings.model_fields:
            given["finish_timeout"] = float(os.environ.get("WANDB_FINISH_TIMEOUT", self.WAIT))
        team, _, project = self.to.rpartition("/")
        try:
            self.run = wandb.init(
                entity=team or None,
                project=project,
                id=known,
                resume="allow" if known else None,
                name=os.environ.get("WANDB_NAME", self.run_name()),
                dir=os.environ.get("WANDB_DIR", str(self.out)),
                config=plain(self.cfg),
                settings=wandb.Settings(**given),
            )
        except (AuthenticationError, UsageError) as error:
            wandb.teardown()  # else this process never reads WANDB_MODE again, as a notebook that takes the cure needs
            cure = "wandb login, or WANDB_MODE=offline"
            raise ConfigError(f"log.wandb={self.to}: {first_line(error)}; run: {cure}") from error
        self.id, self.url = self.run.id, None if self.run.offline else self.run.url
        self.run.define_metric("*", step_metric="step")  # a resumed run goes back to the step of its checkpoint

    def place(self) -> str:
        return self.url or f"offline; send it with: wandb sync {Path(self.run.dir).parent}"

    def put(self, numbers: Mapping[str, float], step: int) -> None:
        if not self.failed:
            self.run.log({**numbers, "step": step})

    def finish(self, result: MetricsLine, status: str) -> None:
        import wandb

        if self.failed:
            with suppress(Exception):  # its process died, which it would say once more when Python ends
                wandb.teardown()
            return
        try:
            if result:
                self.run.summary.update({**_final(result), "chosen_step": result["chosen_step"]})
                self.run.log({"report": wandb.Html(str(self.page()), inject=False)})
        finally:
            self.run.finish(exit_code=0 if status == "FINISHED" else 1)


class MlflowTracker(Tracker):
    """A run of MLflow; MLFLOW_TRACKING_URI and its other variables have their usual meaning.

    What a server that is away has not got is kept, and sent with a later evaluation or at the end.
    """

    name = "mlflow"
    MOST = 1000
    """Metrics per request, by MLflow's limit."""
    PARAMS, LENGTH = 100, 500
    """Parameters per request, and characters of one, by its limits (of 2.x; 3.x takes 6,000)."""
    QUIET: ClassVar = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        # the run waits for an answer: half a minute in place of a quarter of an hour
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    }

    def begin(self, known: str | None) -> None:
        for variable, value in self.QUIET.items():
            os.environ.setdefault(variable, value)
        import mlflow
        from mlflow.entities import Param

        self.waiting: list[Any] = []
        self.client = mlflow.MlflowClient()
        if known is not None:
            self.client.update_run(known, status="RUNNING")
            self.id = known
            found = self.client.get_run(known)
        else:
            experiment = self.client.get_experiment_by_name(self.to)
            number = experiment.experiment_id if experiment else self.client.create_experiment(self.to)
            found = self.client.create_run(number, run_name=self.run_name(), tags={"mlflow.source.name": "esm-neuron"})
            self.id = found.info.run_id
            params = [Param(name, value[: self.LENGTH]) for name, value in _flat(plain(self.cfg))]
            for start in range(0, len(params), self.PARAMS):
                self.client.log_batch(self.id, params=params[start : start + self.PARAMS])
        address = mlflow.get_tracking_uri()
        if address.startswith("http"):
            self.url = redact(f"{address.rstrip('/')}/#/experiments/{found.info.experiment_id}/runs/{self.id}")

    def place(self) -> str:
        return self.url or f"run {self.id}"

    def put(self, numbers: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time() * 1000)
        self.waiting += [Metric(name, value, now, step) for name, value in numbers.items()]
        if not self.failed:
            self.send()

    def on_eval(self, step: int, record: MetricsLine) -> None:
        super().on_eval(step, record)
        if self.failed:
            self.attempt(self.send)

    def send(self) -> None:
        """Send what waits; after that nothing has failed."""
        while self.waiting:
            self.client.log_batch(self.id, self.waiting[: self.MOST])
            del self.waiting[: self.MOST]
        self.failed = False

    def finish(self, result: MetricsLine, status: str) -> None:
        self.send()
        try:
            if result:
                self.put(_final(result), result["chosen_step"])
                self.client.log_artifacts(self.id, str(self.page().parent), REPORT)
                for name in (CONFIG, RESULT):
                    self.client.log_artifact(self.id, str(self.out / name))
        finally:
            self.client.set_terminated(self.id, status)


def _flat(values: Mapping[str, Any], section: str = "") -> Iterator[tuple[str, str]]:
    """Yield settings by their names."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{section}{name}.")
        else:
            yield f"{section}{name}", str(value)
