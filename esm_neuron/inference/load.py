"""Find and load the model that predicts: a finished training run, a folder of transformers or PEFT, or a hub id."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esm_neuron import __version__
from esm_neuron.config import (
    COMPARED_BY_CONTENT,
    AdapterConfig,
    BackendName,
    ModelConfig,
    ParallelConfig,
    TrainConfig,
    require,
    settings,
)
from esm_neuron.config.backends import spec_of
from esm_neuron.config.deferred import module
from esm_neuron.distributed import is_alone
from esm_neuron.errors import CheckpointError, ConfigError
from esm_neuron.files import NOTHING, NUMBER, read_json, sha256
from esm_neuron.inference.folders import find_head, task_config
from esm_neuron.models.adapter_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, is_adapter
from esm_neuron.models.shapes import in_folder, locate
from esm_neuron.run_dir import ADAPTER, BASE, CONFIG, MEMBER, MODEL, REFERENCE, member_folders, read_calibration
from esm_neuron.tasks import create_task
from esm_neuron.tasks.base import Task

if TYPE_CHECKING:
    from torch import Tensor

    from esm_neuron.backends.base import Backend
    from esm_neuron.models import hf_folder, lora
    from esm_neuron.models.hf_folder import BaseReference
    from esm_neuron.training import build
    from esm_neuron.training.build import Built
else:
    build = module("esm_neuron.training.build")
    hf_folder, lora = module("esm_neuron.models.hf_folder"), module("esm_neuron.models.lora")

logger = logging.getLogger(__name__)

_COMPUTING = ("loop.eval_packs_per_device", "loop.precision", "loop.tracing", "parallel.")
_PACKING = ("data.max_residues", "data.packing", "data.pack_tokens", "data.max_segments", "data.on_bad_residue")
_INPUT = (
    "data.id_column", "data.sequence_column", "data.sheet", "data.keep", "data.on_missing", "data.min_residues",
    "data.long_sequences", "data.window_overlap",
)  # fmt: skip
MAY_CHANGE: dict[str, tuple[str, ...]] = {
    "predict": (*_INPUT, *_PACKING, *_COMPUTING),
    "load": (*_INPUT, *_PACKING, *_COMPUTING),
    "serve": (*_INPUT, *_PACKING, *_COMPUTING),
    "embed": (*_INPUT, *_PACKING, *_COMPUTING),
    "evaluate": (
        *_INPUT,
        "data.label_column",
        "data.label_separator",
        "data.mask_column",
        "data.homologs",
        *_PACKING,
        *_COMPUTING,
    ),
    "export": (),
    "score": ("data.id_column", "data.sequence_column", *_PACKING, *_COMPUTING),  # columns of the wild type's file
}
"""Command -> the settings of a finished run that it may overrule: those that act there."""


@dataclass(frozen=True)
class ModelSpec:
    """A model that was found and not yet read: one trained for a task, or an ESM-2 as it is."""

    cfg: TrainConfig
    task: Task | None
    """What a trained model answers; None for a plain ESM-2."""

    def load(self, plain: Task, backend: Backend) -> Built:
        """Return the model on the backend's device: the run's own, or what the task `plain` makes of an ESM-2."""
        if self.task is not None:
            return build_trained(self.cfg, self.task, backend)
        return build.build_model(self.cfg, plain, backend)

    def identity(self, built: Built, **more: Any) -> dict[str, Any]:
        """Return what decides a prediction besides the input, in JSON's types: weights, settings, and `more`."""
        cfg, adapter = self.cfg, Path(self.cfg.output) / ADAPTER / ADAPTER_WEIGHTS
        adapted = self.task is not None and cfg.adapter.kind in ("lora", "qlora")
        others = {*COMPARED_BY_CONTENT, "cache", "homologs"}
        data = {name: value for name, value in settings.plain(cfg.data).items() if name not in others}
        sections = {"adapter": settings.plain(cfg.adapter), "task": settings.plain(cfg.task), "data": data}
        return {
            "version": __version__,
            "base weights": built.source.reference.sha256,
            "adapter": sha256(adapter) if adapted else None,
            "seed": cfg.seed,
            **{f"model.{name}": getattr(cfg.model, name) for name in ("pooling", "layers", "composition", "head")},
            "loop.precision": cfg.loop.precision,
            **{f"{section}.{name}": value for section, values in sections.items() for name, value in values.items()},
            **more,
        }


def find_model(name: str, backend: BackendName | None, words: Sequence[str], command: str) -> ModelSpec:
    """Find an encoder that `--model` names: the output folder of a training run, another's folder, or a hub id.

    Without a `backend` it is to run where it was trained, a plain ESM-2 on `cpu`. `words` are settings that overrule
    those of the run, see `MAY_CHANGE`; `command` is for messages.
    """
    folder = Path(name)
    if (folder / CONFIG).is_file():
        cfg, task = read_run(folder, backend)
        return ModelSpec(overruled(cfg, words, command), task)
    plain = TrainConfig(model=ModelConfig(name=name), adapter=AdapterConfig(kind="none"), backend=backend or "cpu")
    cfg = settings.override(plain, words, (*MAY_CHANGE[command], "model.base", "model.revision"), command)
    if is_alone():
        locate(cfg.model)
    return ModelSpec(cfg, None)


def find_trained(
    name: str | Path, backend: BackendName | None, words: Sequence[str], command: str
) -> tuple[TrainConfig, Task]:
    """Find the trained model that `--model` names, ready for `build_trained`; otherwise as `find_model`.

    That is the output folder of a training run, or a folder that `export`, transformers' Trainer or PEFT wrote.
    """
    folder = Path(name).expanduser()
    if (folder / CONFIG).is_file():
        cfg, task = read_run(folder, backend)
        return overruled(cfg, words, command), task
    if folder.name == ADAPTER and (folder.parent / CONFIG).is_file():
        raise ConfigError(f"--model {name}: is the adapter of a training run; name the run, --model {folder.parent}")
    plain = TrainConfig(model=ModelConfig(name=str(name)), adapter=AdapterConfig(kind="none"), backend=backend or "cpu")
    cfg = settings.override(plain, words, (*MAY_CHANGE[command], "model.base", "model.revision", "task."), command)
    if folder.is_dir():
        locate(cfg.model)
    if not is_adapter(folder) and not (folder / "config.json").is_file():
        raise ConfigError(
            f"--model {name}: no {CONFIG} there, no config.json and no {ADAPTER_CONFIG}; {command} needs the output "
            "folder of a training run, or a folder with a trained model by transformers or PEFT"
        )
    head = find_head(cfg.model)
    cfg = replace(
        cfg,
        model=replace(cfg.model, **head.model),
        task=task_config(head, cfg.task, str(name), command),
    )
    return cfg, _task_of(cfg, folder)


def find_members(
    name: str | Path, backend: BackendName | None, words: Sequence[str], command: str
) -> tuple[list[ModelSpec], Task]:
    """Find the trained models that `--model` names, as `find_trained` does one: those of an ensemble, or a single one.

    Return them, and the task that reads their mean.
    """
    folder = Path(name).expanduser()
    saved = folder / CONFIG
    several = saved.is_file() and any(folder.glob(f"{MEMBER}*"))
    members = member_folders(folder, settings.read_config(saved)) if several else []
    found = [find_trained(each, backend, words, command) for each in members or (name,)]
    task = found[0][1]
    require(
        not task.needs_labels or command == "evaluate",
        f"{command}: the run masks by region (task.mask_rates), and {command} reads no regions; `evaluate` does, and "
        "`embed` and `score` need none",
    )
    columns = found[0][0].data.sequence_column
    require(
        task.keeps_lm_head or len(found[0][0].data.sequence_columns) == 1,
        f"data.sequence_column={columns} joins chains, which is for masked_lm and `embed`; name one column",
    )
    if members:
        task = task.read_by(read_calibration(folder, len(task.labels)))
    return [ModelSpec(*each) for each in found], task


def _task_of(cfg: TrainConfig, weights: Path) -> Task:
    """Return the task of a model, which reads predictions as the folder of its weights says."""
    task = create_task(cfg.task, cfg.task.labels or ())
    return task.read_by(read_calibration(weights, len(task.labels)))


def overruled(cfg: TrainConfig, words: Sequence[str], command: str) -> TrainConfig:
    """Return the configuration of a run for a command, overruled by `words`, see `MAY_CHANGE`.

    What chose the run's proteins from its own files says nothing about another file: it is left out.
    """
    chosen: dict[str, Any] = {"keep": {}, "keep_heldout": {}, "split_column": None, "valid_column": None}
    own = replace(cfg.data, **chosen, fold=None, sheet=None, min_residues=1)
    return settings.override(replace(cfg, data=own), words, MAY_CHANGE[command], command)


def read_run(folder: Path, backend: BackendName | None = None) -> tuple[TrainConfig, Task]:
    """Return configuration and task of a finished run, ready for `build_trained`. Raise ConfigError for any other."""
    path = folder / CONFIG
    require(path.is_file(), f"--model {folder}: no {CONFIG} there; name the output folder of a training run")
    cfg = settings.read_config(path)
    members = member_folders(folder, cfg)
    require(
        not members,
        f"--model {folder}: is an ensemble of {cfg.seeds} runs, for predict and evaluate; name one of them here: "
        f"{members[0] if members else ''}",
    )
    found = [name for name in (ADAPTER, MODEL) if (folder / name).is_dir()]
    cure = "let its training finish (--checkpoint.resume auto)"
    require(bool(found), f"--model {folder}: no adapter and no model there; {cure}")
    _check_classes(folder, cfg.task.labels)
    # the folder's own weights, where it has the whole model or carries the base of its adapter
    carries = any((folder / BASE).glob("model*.safetensors"))
    own = MODEL if found == [MODEL] else BASE if carries else None
    cfg = replace(cfg, output=str(folder))
    if own is not None:
        cfg = replace(cfg, model=in_folder(cfg.model, folder / own))
    if backend is not None and backend != cfg.backend:
        cfg = move_to(backend, cfg)
    if not cfg.can_quantize and cfg.adapter.kind == "qlora":
        logger.warning(
            "trained on quantized weights, run here on float ones: predictions differ by the quantization error"
        )
        cfg = replace(cfg, adapter=replace(cfg.adapter, kind="lora"))
    return cfg, _task_of(cfg, folder / found[0])


def _check_classes(folder: Path, labels: Sequence[str] | None) -> None:
    """Raise CheckpointError where config.yaml has other classes than the weights, or another order of them."""
    path = folder / ADAPTER / REFERENCE
    if not path.is_file():
        path = folder / MODEL / "config.json"
    said = read_json(path, {"labels?": [str], "id2label?": {"*": str}}, CheckpointError, "train it again")
    names = said.get("id2label", {})
    trained = said.get("labels", [names[key] for key in sorted(names, key=lambda key: (len(key), key))])
    if labels and trained and list(labels) != trained:
        at = next((i for i, pair in enumerate(zip(labels, trained, strict=False)) if pair[0] != pair[1]), len(labels))
        raise CheckpointError(
            f"{folder / CONFIG}: task.labels are not the classes of the weights in their order, which {path} has (the "
            f"first difference is in place {at + 1}); put them back"
        )


def move_to(backend: BackendName, cfg: TrainConfig) -> TrainConfig:
    """Return a run's configuration for another backend, without what only its own has: number of cores and formats."""
    # CPUs without bf16 units emulate it, at a fraction of the speed of float32
    precision = "fp32" if spec_of(backend).emulates_bf16 else cfg.loop.precision
    return replace(
        cfg,
        backend=backend,
        parallel=ParallelConfig(),
        loop=replace(cfg.loop, tf32=False, torch_compile=False, optlevel=2, precision=precision),
        optim=replace(cfg.optim, kind="adamw"),
    )


def build_trained(cfg: TrainConfig, task: Task, backend: Backend) -> Built:
    """Build a trained model with its weights, on the backend's device.

    Raise CheckpointError where the adapter is damaged, or the base weights are not those it was trained on.
    """
    if cfg.adapter.kind not in ("lora", "qlora"):
        built = build.build_model(cfg, task, backend, trained=True)
        path = Path(cfg.model.name) / REFERENCE
        if path.is_file():
            said = read_json(path, {"sha256": str}, CheckpointError, _AGAIN)
            _check_sum(path.parent, path, said, "sha256", built.source.reference.sha256)
        return built
    built = build.build_model(cfg, task, backend)
    folder = Path(cfg.output) / ADAPTER
    reference = read_reference(folder)
    if built.source.reference.sha256 != reference.sha256:
        raise CheckpointError(
            f"{folder}: was trained on {reference.name} with sha256 {reference.sha256[:12]}, but {cfg.model.name} has "
            f"{built.source.reference.sha256[:12]}; give the weights it was trained on"
        )
    _check_adapter_config(folder, built)
    names = {lora.saved_key(n): n for n, p in built.model.named_parameters() if p.requires_grad}
    saved = read_adapter(folder)
    unknown = sorted(set(saved) - set(names))
    if unknown:
        raise CheckpointError(f"{folder}: {len(unknown)} tensors do not fit the model, the first is {unknown[0]}")
    _check_reference(folder, built)
    backend.load_weights(built.model, {names[key]: value for key, value in saved.items()})
    return built


_AGAIN = "copy the run again"


def _check_sum(changed: Path, path: Path, said: Mapping[str, Any], key: str, now: str) -> None:
    """Raise CheckpointError where the sum in `path` is not that of the weights now."""
    if said[key] != now:
        raise CheckpointError(
            f"{changed}: is not what training wrote; {_AGAIN}, or, if you changed it on purpose, make {key} in {path} "
            f"{now}"
        )


def _check_reference(folder: Path, built: Built) -> None:
    """Raise CheckpointError where the adapter or its base's config.json is not as it was when the run ended."""
    path = folder / REFERENCE
    said = read_json(path, {"adapter": str, "config": {"*": (*NUMBER, bool)}}, CheckpointError, _AGAIN)
    for name, value in said["config"].items():
        now = getattr(built.config, name, None)
        if now != value:
            raise CheckpointError(
                f"{folder}: was trained on a base whose config.json had {name} {value!r}, and it has {now!r} now; give "
                "the base as it was"
            )
    _check_sum(folder / ADAPTER_WEIGHTS, path, said, "adapter", sha256(folder / ADAPTER_WEIGHTS))


DECISIVE = ("r", "lora_alpha", "use_rslora", "use_dora", "bias", "rank_pattern", "alpha_pattern")
"""Fields of adapter_config.json that decide what the adapter's matrices compute."""


def _check_adapter_config(folder: Path, built: Built) -> None:
    """Raise CheckpointError where adapter_config.json says other than config.yaml, by which the model was built."""
    path = folder / ADAPTER_CONFIG
    written = read_json(path, {}, CheckpointError, "export it again")
    model: Any = built.model
    used = model.peft_config["default"]
    for name in DECISIVE:
        if name in written and written[name] != getattr(used, name):
            raise CheckpointError(
                f"{path}: {name} is {written[name]!r}, but {CONFIG} of the run gives {getattr(used, name)!r}; "
                "an adapter that was changed by hand predicts in plain PEFT, or put the value back"
            )


def read_adapter(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of an adapter. Raise CheckpointError where they are damaged, or no finite floats."""
    path = folder / ADAPTER_WEIGHTS
    saved = hf_folder.load_tensors(path, "export it again")
    for key, tensor in saved.items():
        hf_folder.check_values(str(path), key, tensor)
    return saved


def read_reference(folder: Path) -> BaseReference:
    form = {"name": str, "revision": (str, NOTHING), "sha256": str}
    said = read_json(folder / REFERENCE, form, CheckpointError, "it names the base of the adapter")
    return hf_folder.BaseReference(**{name: said[name] for name in form})
