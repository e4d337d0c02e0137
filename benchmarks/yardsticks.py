"""Published yardsticks beside our numbers: Schmirler's ten-class location (setHARD), FLIP and FLIP2 splits.

    python benchmarks/yardsticks.py --data yardsticks --download              # every split, 8M to 650M, 3 seeds: a GPU
    python benchmarks/yardsticks.py --only scl/mixed_hard --models 8M --kinds probe lora --seeds 5
    python benchmarks/yardsticks.py --data small --models mini --kinds lora --seeds 1 --set loop.max_steps=20

Files are `DATA/<set>/<split>.csv` (or .csv.gz) in FLIP's form: sequence, target, set, validation. With `--download`
those that lack are fetched from their makers; nothing else here uses a network, but for a hub's model. A run is
`esm-neuron train`; it can be stopped and started again. Test proteins are scored once per seed, with the step that
validation chose. The paper's column is what its source says, on its own training and the same test proteins.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import os
import statistics
import urllib.request
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("USE_TORCH_XLA", "0")  # accelerate, under peft, would import torch_xla: half a minute

from esm_neuron.config import TrainConfig, settings
from esm_neuron.data.cache import content_key
from esm_neuron.files import read_json, write_bytes, write_json
from esm_neuron.run_dir import RESULT
from esm_neuron.training import run

MODELS = {
    "mini": "mini",
    "8M": "facebook/esm2_t6_8M_UR50D",
    "35M": "facebook/esm2_t12_35M_UR50D",
    "150M": "facebook/esm2_t30_150M_UR50D",
    "650M": "facebook/esm2_t33_650M_UR50D",
}
RATES = {"mini": 2e-3, "8M": 1e-3, "35M": 1e-3, "150M": 5e-4, "650M": 3e-4}
"""LoRA's learning rate by model; all weights are trained with a fifth of it."""
LIMIT = 1 << 28
"""Most bytes of a downloaded file."""
FLIP = "https://github.com/J-SNACKKB/FLIP/raw/main/splits"
FLIP2 = "https://flip.protein.properties/assets/splits"
SCHMIRLER = "Schmirler 2024, doi:10.1038/s41467-024-51844-2, SOM tables S3 and S4"


@dataclass(frozen=True)
class Yardstick:
    """One split, and what a paper says of it."""

    name: str
    """set/split, as FLIP names them."""
    task: str
    metric: str
    """Metric of result.json that the paper's column has."""
    source: str = ""
    """Of the paper's column."""
    frozen: Mapping[str, float] = field(default_factory=dict)
    """Model -> the paper's value for a classifier on frozen embeddings, in the metric's own unit."""
    tuned: Mapping[str, float] = field(default_factory=dict)
    """Model -> the paper's value for fine-tuning all weights."""

    @property
    def url(self) -> str:
        """Return where its makers have it: a zip of all splits of a set, or a .csv.gz."""
        return f"{FLIP2}/{self.name}.csv.gz" if self.name.partition("/")[0] in FLIP2_SETS else self._flip

    @property
    def _flip(self) -> str:
        return f"{FLIP}/{self.name.partition('/')[0]}/splits.zip"

    def paper(self, model: str, kind: str) -> float | None:
        """Return the paper's value for a model, frozen (probe, head) or fine-tuned; None where it has none."""
        return (self.frozen if kind in ("probe", "head") else self.tuned).get(model)


FLIP2_SETS = ("amylase", "hydro", "ired", "nucb", "pdz3", "rhomax", "trpb")


def _percent(*values: float) -> dict[str, float]:
    return dict(zip(("8M", "35M", "150M", "650M"), (round(value / 100, 4) for value in values), strict=True))


UNPUBLISHED = (
    "gb1/low_vs_high", "gb1/one_vs_rest", "gb1/two_vs_rest", "aav/low_vs_high", "rhomax/by_wild_type",
    "ired/two_to_many",
)  # fmt: skip
"""Splits without a paper's column here."""
YARDSTICKS = (
    Yardstick(
        "scl/mixed_hard", "sequence_classification", "accuracy", SCHMIRLER,
        _percent(52.0, 54.9, 59.4, 62.9), _percent(55.9, 58.1, 61.6, 63.8),
    ),
    Yardstick(
        "gb1/three_vs_rest", "regression", "spearman", SCHMIRLER,
        _percent(81.8, 82.7, 83.3, 85.7), _percent(88.3, 87.9, 87.9, 87.9),
    ),
    Yardstick(
        "aav/two_vs_many", "regression", "spearman", SCHMIRLER,
        _percent(66.9, 59.0, 65.7, 47.1), _percent(82.7, 80.8, 84.6, 78.3),
    ),
    Yardstick(
        "meltome/mixed", "regression", "spearman", SCHMIRLER,
        _percent(56.4, 58.6, 61.7, 65.6), _percent(58.4, 59.8, 62.6, 66.4),
    ),
    *(Yardstick(name, "regression", "spearman") for name in UNPUBLISHED),
)  # fmt: skip
"""FLIP (Dallago 2021, doi:10.1101/2021.11.09.467890) has no column for ESM-2, and that of FLIP2 (Didi 2026,
doi:10.64898/2026.02.23.707496) is not copied here: splits without values are run and printed without a paper's."""


def find(yardstick: Yardstick, data: Path, download: bool) -> Path:
    """Return the split's file; fetch it where it lacks and may be; raise FileNotFoundError where it may not."""
    for suffix in (".csv", ".csv.gz"):
        path = data / f"{yardstick.name}{suffix}"
        if path.is_file():
            return path
    if not download:
        raise FileNotFoundError(f"{data / yardstick.name}.csv is missing; add --download, or put it there")
    path = data / f"{yardstick.name}.csv.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    print(f"fetching {yardstick.url}", flush=True)
    with urllib.request.urlopen(yardstick.url, timeout=60) as answer:
        content = answer.read(LIMIT + 1)
    if len(content) > LIMIT:
        raise ValueError(f"{yardstick.url}: more than {LIMIT} bytes")
    write_bytes(path, content if yardstick.url.endswith(".gz") else gzip.compress(member(content, yardstick.name)))
    return path


def member(archive: bytes, name: str) -> bytes:
    """Return the .csv of a split from a zip of all splits of its set."""
    wanted = f"{name.rpartition('/')[2]}.csv"
    with zipfile.ZipFile(io.BytesIO(archive)) as file:
        for each in file.infolist():
            if Path(each.filename).name == wanted and not each.filename.startswith("__MACOSX"):
                if each.file_size > LIMIT:
                    raise ValueError(f"{wanted}: more than {LIMIT} bytes")
                return file.read(each)
    raise FileNotFoundError(f"the archive has no {wanted}")


def configured(
    yardstick: Yardstick, path: Path, model: str, kind: str, seed: int, args: argparse.Namespace
) -> TrainConfig:
    """Return the settings of one run."""
    rate = RATES[model] * (1.0 if kind == "lora" else 0.2)
    other = [content_key(args.set)[:8]] if args.set else []  # settings make another run
    name = "-".join([yardstick.name, model, kind, str(seed), *other])
    words = [
        f"--output={args.runs}/{name.replace('/', '-')}",
        f"--backend={args.backend}", f"--seed={seed}", f"--task.name={yardstick.task}", f"--data.train={path}",
        "--data.label_column=target", "--data.split_column=set", f"--model.name={MODELS[model]}",
        f"--adapter.kind={'none' if kind == 'full' else kind}", "--data.homologs=off", "--log.baselines=false",
        "--checkpoint.resume=auto", "--data.on_bad_residue=replace",
    ]  # fmt: skip
    if has_validation(path):
        words.append("--data.valid_column=validation")
    if kind in ("lora", "full"):
        words += [f"--optim.lr={rate}", "--optim.warmup_ratio=0.1", "--loop.epochs=10", "--loop.min_steps=500",
                  "--loop.min_evals=10", "--loop.patience=4", "--loop.packs_per_step=8"]  # fmt: skip
        words += ["--adapter.r=16", "--adapter.alpha=32"] if kind == "lora" else []
    return settings.parse([*words, *(f"--{each}" for each in args.set)])


def has_validation(path: Path) -> bool:
    """Return whether the file marks validation proteins; elsewhere they are sampled."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        rows = csv.DictReader(file)
        return any(row.get("validation", "").lower() == "true" for row in rows)


def collect(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Run what has no result yet; yield a row per yardstick, model and kind."""
    for yardstick in (each for each in YARDSTICKS if not args.only or each.name in args.only):
        try:
            path = find(yardstick, args.data, args.download)
        except FileNotFoundError as error:
            print(f"left out: {error}", flush=True)
            continue
        for model in args.models:
            for kind in args.kinds:
                values = []
                for seed in range(args.seeds):
                    cfg = configured(yardstick, path, model, kind, seed, args)
                    finished = Path(cfg.output) / RESULT
                    if not finished.is_file():
                        print(f"== {cfg.output}", flush=True)
                        run.train(cfg, lambda text: print(text, flush=True))
                    values.append(read_json(finished)["test"][yardstick.metric])
                yield {
                    "split": yardstick.name, "model": model, "kind": kind, "metric": yardstick.metric,
                    "values": values, "paper": yardstick.paper(model, kind), "source": yardstick.source,
                }  # fmt: skip


def render(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a table in Markdown: the paper's column beside ours, mean and standard deviation over the seeds."""
    lines = ["| split | model | trained | metric | ours | paper |", "|---|---|---|---|---|---|"]
    for row in rows:
        spread = f" ± {statistics.stdev(row['values']):.3f}" if len(row["values"]) > 1 else ""
        ours = f"{statistics.mean(row['values']):.3f}{spread} (n = {len(row['values'])})"
        paper = "-" if row["paper"] is None else f"{row['paper']:.3f}"
        lines.append(f"| {row['split']} | {row['model']} | {row['kind']} | {row['metric']} | {ours} | {paper} |")
    sources = dict.fromkeys(row["source"] for row in rows if row["paper"] is not None)
    return "\n".join([*lines, *(f"\nPaper: {source}" for source in sources)])


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("yardsticks"), help="folder of the splits")
    parser.add_argument("--download", action="store_true", help="fetch splits that lack, from FLIP's makers")
    parser.add_argument("--only", nargs="+", default=[], choices=[each.name for each in YARDSTICKS])
    parser.add_argument("--models", nargs="+", default=["8M", "35M", "150M", "650M"], choices=list(MODELS))
    parser.add_argument("--kinds", nargs="+", default=["head", "lora"], choices=["probe", "head", "lora", "full"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--backend", default="cpu")
    parser.add_argument("--runs", type=Path, default=Path("runs/yardsticks"))
    parser.add_argument("--output", type=Path, help="JSON of the table")
    parser.add_argument("--set", nargs="+", default=[], metavar="SETTING=VALUE", help="settings of every run")
    return parser.parse_args(argv)


def main() -> None:
    """Run the command at the top of this file."""
    args = arguments()
    rows = list(collect(args))
    if args.output is not None:
        write_json(args.output, rows)
    print(render(rows))


if __name__ == "__main__":
    main()
