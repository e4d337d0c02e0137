"""The command line: `esm-neuron COMMAND ...`. A known error is one line and an exit code, without a traceback."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import traceback
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, get_args

from esm_neuron.config import BackendName, DataConfig, TaskConfig, TaskName, TrainConfig, require
from esm_neuron.errors import ConfigError, EsmNeuronError
from esm_neuron.redact import RedactedRecord, RedactingFormatter, redact
from esm_neuron.training.signals import EXIT_STOPPED


class CommandParser(ArgumentParser):
    """Parses the words of a command; what argparse would print and exit with is raised, for `cli.main` to say."""

    def error(self, message: str) -> NoReturn:
        """Raise what is wrong with the words.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(f"{message}; see {self.prog} --help")


def train(argv: Sequence[str]) -> int:
    """Fine-tune a model: --config FILE and --section.field VALUE."""
    from esm_neuron.config import settings

    cfg = settings.parse(argv)
    from esm_neuron.training.run import train as run_training

    outcome = run_training(cfg, log)
    if outcome.stopped_by:
        log(f"stopped by {outcome.stopped_by}; the state is saved, go on with --checkpoint.resume auto")
        return EXIT_STOPPED
    for split in ("valid", "test"):
        if outcome.result.get(split):
            log(f"{split}: {json.dumps(outcome.result[split])}")
    return 0


def evaluate(argv: Sequence[str]) -> int:
    """Figures of a finished run on a labelled file, as JSON. Also --data.* as for train."""
    parser = _parser("evaluate", evaluate)
    parser.add_argument("--input", required=True, type=Path, help="file with labels; columns as in training")
    parser.add_argument("--output", type=Path, help="JSON file; printed as well")
    args, settings = parser.parse_known_args(argv)
    from esm_neuron.inference.evaluate import evaluate as run_evaluation

    _print_json(run_evaluation(args.model, args.input, args.output, args.backend, log, settings))
    return 0


def predict(argv: Sequence[str]) -> int:
    """What a trained model says of every record of a file. Also --data.* as for train."""
    parser = _answer_parser("predict", predict, "output folder of a training run", "CSV, TSV, JSONL or Parquet")
    args, settings = parser.parse_known_args(argv)
    from esm_neuron.inference.predict import predict as run_prediction

    options = {"backend": args.backend, "settings": settings, "resume": args.resume, "log": log}
    written = run_prediction(args.model, args.input, args.output, **options)
    _log_on_main(f"{written} records answered in {args.output}")
    return 0


def embed(argv: Sequence[str]) -> int:
    """Embedding of every record of a file, by a pretrained or a trained model. Also --data.* as for train."""
    parser = _answer_parser("embed", embed, MODELS, "Parquet or safetensors")
    parser.add_argument(
        "--pooling",
        choices=("mean", "cls", "residue"),
        default="mean",
        help="one vector a protein, the mean of its residues (default) or the state of <cls>; or one a residue",
    )
    args, settings = parser.parse_known_args(argv)
    from esm_neuron.inference.embed import embed as run_embedding

    options = {"backend": args.backend, "settings": settings, "resume": args.resume, "log": log}
    written = run_embedding(args.model, args.input, args.output, args.pooling, **options)
    _log_on_main(f"{written} embeddings in {args.output}")
    return 0


def score(argv: Sequence[str]) -> int:
    """Zero-shot effect of every variant of a table, by the language model's head. Also --data.* as for train."""
    parser = _answer_parser("score", score, MODELS, "CSV, TSV, JSONL or Parquet", "table with a variant a row")
    parser.add_argument(
        "--method",
        choices=("wild-type-marginal", "masked-marginal", "pseudo-perplexity"),
        default="masked-marginal",
        help="from one pass, one a distinct set of residues (default), or one a residue of every variant",
    )
    parser.add_argument("--wild-type", type=Path, help="file with the one protein that variants are named after")
    parser.add_argument("--variant-column", default="variant", help="substitutions such as A42G:L50P; default: variant")
    parser.add_argument("--sequence-column", help="whole sequences, read instead of --variant-column")
    parser.add_argument("--score-column", help="measured values; prints the rank correlation with them as JSON")
    parser.add_argument("--first-residue", type=int, default=1, help="number of the wild type's first residue")
    args, settings = parser.parse_known_args(argv)
    from esm_neuron.inference.score import score as run_scoring
    from esm_neuron.inference.variants import VariantColumns

    found = run_scoring(
        args.model,
        args.input,
        args.output,
        args.method,
        wild_type=args.wild_type,
        columns=VariantColumns(args.variant_column, args.sequence_column, args.score_column),
        first_residue=args.first_residue,
        backend=args.backend,
        settings=settings,
        resume=args.resume,
        log=log,
    )
    _log_on_main(f"{found['rows']} variants scored in {args.output}")
    if args.score_column:
        _print_json(found)
    return 0


def report(argv: Sequence[str]) -> int:
    """A finished run as one HTML page, with its charts as PNG: curves, figures, calibration, errors."""
    parser = CommandParser(prog="esm-neuron report", description=report.__doc__)
    parser.add_argument("run", type=Path, help="output folder of a training run; the page is written to its report/")
    args = parser.parse_args(argv)
    from esm_neuron.reports import write_report

    log(f"report written to {write_report(args.run)}")
    return 0


def export(argv: Sequence[str]) -> int:
    """Merge a run's adapter into its base and write a Hugging Face folder with a model card."""
    parser = CommandParser(prog="esm-neuron export", description=export.__doc__, allow_abbrev=False)
    parser.add_argument("--model", required=True, type=Path, help="output folder of a training run")
    parser.add_argument("--output", required=True, type=Path, help="folder to write")
    args = parser.parse_args(argv)
    from esm_neuron.inference.export import export as run_export

    run_export(args.model, args.output)
    log(f"Hugging Face folder written to {args.output}")
    return 0


def convert(argv: Sequence[str]) -> int:
    """Turn a folder of PyTorch pickle shards into sharded safetensors."""
    parser = CommandParser(prog="esm-neuron convert", description=convert.__doc__)
    parser.add_argument("source", type=Path, help="folder with pytorch_model*.bin and config.json")
    parser.add_argument("target", type=Path, help="folder to write")
    args = parser.parse_args(argv)
    from esm_neuron.models.convert import convert as run_conversion

    run_conversion(args.source, args.target)
    log(f"safetensors written to {args.target}")
    return 0


def plan(argv: Sequence[str]) -> int:
    """Packs, programs, parallelism, time and dollars of a run, before it: --config FILE and flags as for train."""
    parser = CommandParser(prog="esm-neuron plan", description=plan.__doc__, add_help=False, allow_abbrev=False)
    parser.add_argument("--devices", type=int, default=1, help="data-parallel devices of the run; default 1")
    parser.add_argument(
        "--instance", help="add time and dollars: ml.trn1.32xlarge (SageMaker), trn1.32xlarge (EC2), ..."
    )
    parser.add_argument("--nodes", type=int, default=1, help="instances of the job; default 1")
    parser.add_argument("--prices", type=Path, help="price list; default: the one of this package, which is dated")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args, rest = parser.parse_known_args(argv)
    if {"-h", "--help"} & set(rest):
        parser.print_help()
    from esm_neuron.config import rules, settings

    cfg = settings.parse(rest, "plan")
    rules.validate(cfg)
    require(args.devices >= 1, f"--devices {args.devices} must be at least 1")
    require(args.nodes >= 1, f"--nodes {args.nodes} must be at least 1")
    from esm_neuron.data.splits import load_splits
    from esm_neuron.models.shapes import known_shape
    from esm_neuron.planning.plan import make_plan, metrics, render
    from esm_neuron.tasks import task_class

    made = make_plan(cfg, load_splits(cfg, task_class(cfg.task.name).label_kind), args.devices)
    said, text = metrics(made), [render(made)]
    if args.instance is not None:
        from esm_neuron.planning import cost

        prices = cost.read_prices(args.prices)
        asked, market = cost.price_of(args.instance, prices)
        shape = known_shape(cfg.model.name)
        if shape is None:
            raise ConfigError(
                f"--instance: the shape of {cfg.model.name} is not known; name a local folder or an ESM-2"
            )
        costs = cost.estimates(cfg, made, shape, prices, args.nodes, market)
        said["estimates"] = [asdict(e) for e in costs]
        text.append(cost.render(costs, prices, asked, market))
    print(json.dumps(said, indent=2) if args.json else "\n".join(text))
    return 0


def compile_ahead(argv: Sequence[str]) -> int:
    """Compile the programs of a run ahead of it, on xla or neuron: --config FILE and flags as for train.

    On Trainium: neuron_parallel_compile torchrun --nproc_per_node N -m esm_neuron.cli compile --config FILE, with the
    flags of the training to come.
    """
    from esm_neuron.config import settings

    cfg = settings.parse(argv, "compile")
    from esm_neuron.training.run import compile_graphs as run_compilation

    if cfg.backend == "neuron" and os.environ.get("NEURON_EXTRACT_GRAPHS_ONLY") != "1":
        log("compiling one program after the other; start as `neuron_parallel_compile torchrun ...` for all at once")
    log(f"{run_compilation(cfg, log)} programs compiled")
    return 0


def doctor(argv: Sequence[str]) -> int:
    """What is installed, which devices there are, and what each backend lacks."""
    parser = CommandParser(prog="esm-neuron doctor", description=doctor.__doc__)
    parser.add_argument("--backend", choices=get_args(BackendName), help="exit with 1 when this one cannot run here")
    parser.add_argument("--config", type=Path, help="YAML of a run: decides which variables are set; default: defaults")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    args = parser.parse_args(argv)
    from esm_neuron.planning.doctor import examine, render

    cfg = TrainConfig()
    if args.config is not None:
        from esm_neuron.config import settings

        cfg = settings.read_config(args.config)
    found = examine(cfg)
    print(json.dumps(asdict(found), indent=2) if args.json else render(found))
    return 1 if args.backend and found.lacks[args.backend] else 0


def data_check(argv: Sequence[str]) -> int:
    """Lengths, alphabet, repeats, labels, conflicts, leaks and faults of a file; exit code 1 where rows have faults."""
    parser = CommandParser(prog="esm-neuron data check", description=data_check.__doc__)
    parser.add_argument(
        "file", help="FASTA, CSV, TSV, JSONL, Parquet, a saved dataset or hf://owner/name@revision/split"
    )
    parser.add_argument("--id_column", default=DataConfig.id_column, help="default: %(default)s")
    parser.add_argument("--sequence_column", default=DataConfig.sequence_column, help="default: %(default)s")
    parser.add_argument("--label_column", help="looked at where it is named")
    parser.add_argument(
        "--task",
        choices=[name for name in get_args(TaskName) if name != "masked_lm"],
        default=TaskConfig.name,
        help="what its labels are: one a protein, several joined by `;`, a number, one a residue; default: %(default)s",
    )
    parser.add_argument("--split_column", help="looked at where it is named")
    parser.add_argument("--train", default="train", help="value of the split column for training rows")
    parser.add_argument("--homologs", choices=["kmer", "mmseqs", "off"], default="kmer", help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    args = parser.parse_args(argv)
    from esm_neuron.data.check import check_file
    from esm_neuron.tasks import task_class

    _, valid, test = DataConfig.split_names
    cfg = DataConfig(
        id_column=args.id_column,
        sequence_column=args.sequence_column,
        label_column=args.label_column or DataConfig.label_column,
        split_column=args.split_column,
        split_names=(args.train, valid, test),
    )
    method = None if args.homologs == "off" else args.homologs
    kind = task_class(args.task).label_kind
    labels = kind(TaskConfig(name=args.task), cfg.label_column) if args.label_column and kind else None
    found = check_file(args.file, cfg, labels, method)
    print(json.dumps(asdict(found), indent=2) if args.json else found.render())
    return 1 if found.faults else 0


def data_get(argv: Sequence[str]) -> int:
    """Fetch the public original of a data set of the docs and rebuild our file from it, both proven by sha256."""
    from esm_neuron.data.download import RECIPES
    from esm_neuron.data.download import get as fetch

    parser = CommandParser(prog="esm-neuron data get", description=data_get.__doc__)
    parser.add_argument("name", choices=list(RECIPES), help="which data set, see docs/data.md")
    parser.add_argument("--output", type=Path, default=Path("data"), help="folder to write to; default: %(default)s")
    parser.add_argument("--archive", type=Path, help="the package's wheel or .tar.gz where pip cannot fetch it")
    args = parser.parse_args(argv)
    print(fetch(args.name, args.output, args.archive))
    print(RECIPES[args.name].licence)
    return 0


DATA_COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {"check": data_check, "get": data_get}
"""Sub-command -> function of the words after it, returning the exit code."""


def data(argv: Sequence[str]) -> int:
    """Look at a file of proteins (`data check`), or get those of the docs (`data get`)."""
    parser = CommandParser(prog="esm-neuron data", description=data.__doc__)
    parser.add_argument(
        "command", choices=list(DATA_COMMANDS), help="`data check --help` and `data get --help` tell more"
    )
    args = parser.parse_args(argv[:1])
    return DATA_COMMANDS[args.command](argv[1:])


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": train,
    "evaluate": evaluate,
    "predict": predict,
    "embed": embed,
    "score": score,
    "report": report,
    "export": export,
    "convert": convert,
    "plan": plan,
    "compile": compile_ahead,
    "doctor": doctor,
    "data": data,
}
"""Command -> function of the words after it, returning the exit code."""


def log(line: str) -> None:
    """One line for a person, in one write, without secrets."""
    sys.stderr.write(redact(line) + "\n")
    sys.stderr.flush()


def _on_main() -> bool:
    """Whether this is the one process, or torchrun's first, which prints for all."""
    return os.environ.get("RANK", "0") == "0"


def _log_on_main(line: str) -> None:
    if _on_main():
        log(line)


def _print_json(found: Any) -> None:
    if _on_main():
        print(json.dumps(found, indent=2))


MODELS = "output folder of a training run, Hugging Face folder of ESM-2, or hub id"


def _answer_parser(
    name: str, command: Callable[..., int], model: str, formats: str, source: str = "FASTA, CSV, TSV, JSONL or Parquet"
) -> CommandParser:
    parser = CommandParser(prog=f"esm-neuron {name}", description=command.__doc__, allow_abbrev=False)
    parser.add_argument("--model", required=True, help=model)
    parser.add_argument("--input", required=True, type=Path, help=source)
    parser.add_argument("--output", required=True, type=Path, help=f"file to write: {formats}, by its suffix")
    parser.add_argument("--backend", choices=get_args(BackendName), help="default: where it was trained, else cpu")
    parser.add_argument("--resume", action="store_true", help="go on with the parts that a killed command left")
    return parser


def _parser(name: str, command: Callable[..., int]) -> CommandParser:
    parser = CommandParser(prog=f"esm-neuron {name}", description=command.__doc__, allow_abbrev=False)
    parser.add_argument("--model", required=True, type=Path, help="output folder of a training run")
    parser.add_argument("--backend", choices=get_args(BackendName), help="where to run; default: where it was trained")
    return parser


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
    return "\n".join(["usage: esm-neuron COMMAND ...", "", *lines, "", "esm-neuron COMMAND --help tells more."])


def show_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """`sys.excepthook` of a program: a traceback without secrets."""
    log("".join(traceback.format_exception(kind, error, trace)).rstrip())


def show_failure(failed: threading.ExceptHookArgs) -> None:
    """`threading.excepthook` of a program: what failed beside it; an error of the file system is one line."""
    if isinstance(failed.exc_value, OSError):
        log(f"WARNING: {failed.thread and failed.thread.name}: {failed.exc_value}")
    elif failed.exc_value is not None:
        show_traceback(failed.exc_type, failed.exc_value, failed.exc_traceback)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the process's exit code. A known error is one line."""
    if argv is None:  # as a program: a traceback, which is a bug's, quotes what libraries said
        sys.excepthook, threading.excepthook = show_traceback, show_failure
        logging.captureWarnings(True)  # as log lines: these hold no secrets
    try:
        return run(argv)
    except EsmNeuronError as error:
        log(f"esm-neuron: error: {error}")
        return error.exit_code
    except OSError as error:  # a disk that is full, a folder that cannot be written
        log(f"esm-neuron: error: {error}; free space, or fix the path or its permissions")
        return 2
    except KeyboardInterrupt:  # ctrl-C where no step has to be finished first
        log("esm-neuron: stopped by SIGINT")
        return 128 + signal.SIGINT


def run(argv: Sequence[str] | None = None) -> int:
    """`main` for callers that report errors themselves.

    Raises:
        EsmNeuronError: as the command does.
        OSError: of the file system.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(_usage())
        return 0 if words else 2
    if words[0] == "--version":
        from esm_neuron import __version__

        print(__version__)
        return 0
    if words[0] not in COMMANDS:
        log(f"esm-neuron: error: unknown command {words[0]!r}; the commands are {', '.join(COMMANDS)}")
        return 2
    logging.setLogRecordFactory(RedactedRecord)  # libraries have loggers and handlers of their own
    handler = logging.StreamHandler()
    handler.setFormatter(RedactingFormatter("%(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    # accelerate, under peft, would import torch_xla wherever it is installed: seconds, and a device nobody asked for
    os.environ.setdefault("USE_TORCH_XLA", "0")
    # torch_xla's import brings in torch's inductor, which would start a pool of compiler processes that nobody uses
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    return COMMANDS[words[0]](words[1:])


if __name__ == "__main__":
    sys.exit(main())
