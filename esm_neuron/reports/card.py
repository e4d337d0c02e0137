"""The model card of a run: README.md with the Hugging Face hub's metadata in front."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import EvalResult, ModelCardData

from esm_neuron import __version__
from esm_neuron.config import TrainConfig
from esm_neuron.data.records import is_hub
from esm_neuron.metrics.text import clean_of, counted, drawn_over, leak_text, reading_text, show, shown
from esm_neuron.models.hf_folder import BaseReference
from esm_neuron.reports.html import environment, trained_text
from esm_neuron.tasks import task_class
from esm_neuron.tasks.base import PooledTask

Kind = Literal["adapter", "model"]

HUB_METRICS = {"mcc": "matthews_correlation", "macro_f1": "f1", "auroc": "roc_auc", "spearman": "spearmanr",
               "pearson": "pearsonr", "r2": "r_squared"}  # fmt: skip
"""Metric -> the hub's name for it, where that is another."""

_TAGS = {"lora": ("lora",), "qlora": ("lora", "qlora")}  # kind of adapter -> what the hub calls it


def model_card(cfg: TrainConfig, result: Mapping[str, Any], base: BaseReference, kind: Kind) -> str:
    """Return a card filled from a finished run, of LoRA matrices for PEFT or of whole weights for transformers.

    `cfg` and `result` are what its config.yaml and result.json hold, `base` the weights it started from.
    """
    name = f"{Path(cfg.model.name).name}-{cfg.task.name}" + ("-lora" if kind == "adapter" else "")
    task = task_class(cfg.task.name)
    split = "test" if result.get("test") else "valid"
    baselines = (result.get("baselines") or {}).get(split, {})
    metrics = result.get(split) or {}
    clean = (result.get("clean") or {}).get(split, {})
    text = environment().get_template("model_card.md.jinja").render(
        cfg=cfg,
        lora=trained_text(cfg.adapter) if cfg.adapter.kind in _TAGS else None,
        result=result,
        base=base,
        base_name=_base_name(cfg),
        kind=kind,
        task=task,
        # the base of an adapter would be loaded with all of its layers
        plain=task.in_transformers(cfg.model) and not (kind == "adapter" and isinstance(cfg.model.layers, int)),
        pooling=cfg.model.pooling if issubclass(task, PooledTask) else None,
        classes=len(cfg.task.labels or ()) or 1,
        files={name: _file(getattr(cfg.data, name)) for name in ("train", "valid", "test")},
        splits=[(name, counted(result[name], task.unit)) for name in ("test", "valid") if result.get(name)],
        columns=["", "this model", *baselines] if metrics else [],
        rows=_rows(metrics, baselines),
        clean=_rows(clean, (result.get("clean_baselines") or {}).get(split, {})),
        clean_counted=counted(clean, task.unit) if clean else "",
        clean_of=clean_of(result, split) if clean else "",
        leaks=leak_text(result, split) if metrics else "",
        split=split,
        verdict=(result.get("verdicts") or {}).get(split, {}).get("text", ""),
        clean_verdict=(result.get("clean_verdicts") or {}).get(split, {}).get("text", ""),
        alarms=(result.get("alarms") or {}).get(split, []),
        reading=reading_text(result),
        drawn_over=drawn_over(metrics) if metrics else "",
        licence=_licence(cfg),
        version=__version__,
        name=name,
    )  # fmt: skip
    return f"---\n{_metadata(cfg, result, name, task.hub_task, kind)}\n---\n{text}"


def _rows(metrics: Mapping[str, Any], baselines: Mapping[str, Any]) -> list[list[str]]:
    """Return one row per metric: its name, its value, the baselines'."""
    everyone = [metrics, *baselines.values()]
    return [[metric.name, *(show(each, metric.key).text for each in everyone)] for metric in shown(metrics)]


def _metadata(cfg: TrainConfig, result: Mapping[str, Any], name: str, pipeline: str | None, kind: Kind) -> str:
    """Return the YAML in front, by the hub's own library, which also checks it."""
    dataset = _file(cfg.data.train) or "unknown"
    results = [
        EvalResult(
            task_type=pipeline or "other",  # the hub has no name for it
            dataset_type=re.sub(r"[^\w.-]+", "-", dataset),
            dataset_name=dataset,
            dataset_split=split,
            metric_type=HUB_METRICS.get(metric.key, metric.key),
            metric_name=metric.name,
            metric_value=round(metric.value, 4),
        )
        for split in ("valid", "test")
        for metric in shown(result.get(split) or {})
        if metric.value is not None
    ]
    base = cfg.model.name if _is_hub_id(cfg) else None
    data = ModelCardData(
        license=_licence(cfg),
        library_name="peft" if kind == "adapter" else "transformers",
        pipeline_tag=pipeline,
        base_model=base,
        base_model_relation=None if base is None else "adapter" if kind == "adapter" else "finetune",
        tags=["biology", "protein", "esm", "esm-2", "esm-neuron", *_TAGS.get(cfg.adapter.kind, ())],
        model_name=name,
        eval_results=results or None,
    )
    return data.to_yaml().strip()


def _is_hub_id(cfg: TrainConfig) -> bool:
    name = cfg.model.name
    return cfg.model.init == "pretrained" and bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name)) and not Path(name).exists()


def _licence(cfg: TrainConfig) -> str:
    """Return the hub's name of the licence: ESM-2's for weights that come from it, else `other`, to be filled in."""
    return "mit" if _is_hub_id(cfg) and cfg.model.name.startswith("facebook/esm2_") else "other"


def _base_name(cfg: TrainConfig) -> str:
    name = cfg.model.name if _is_hub_id(cfg) else Path(cfg.model.name).name
    return f"{name}, newly initialized from seed {cfg.seed}" if cfg.model.init == "random" else name


def _file(source: str | None) -> str | None:
    """Return the name of a data file without its folder, which is private; a hub dataset whole."""
    return source if source is None or is_hub(source) else Path(source).name
