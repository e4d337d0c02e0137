"""The command line: `esm-neuron COMMAND ...`. A known error is one line and an exit code, without a traceback.

A command is a function in `COMMANDS`: its parameters are the flags, annotated with type and help. Heavy packages are
imported inside the functions, so that `--help` and a wrong flag are answered at once.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import json
import logging
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Annotated, Literal

from esm_neuron.config import BackendName, DataConfig, TaskConfig, TrainConfig, require
from esm_neuron.config.backends import BACKENDS
from esm_neuron.config.flags import RENAMED, command_parser, help_of, instead, usage
from esm_neuron.config.threads import prepare
from esm_neuron.data.progress import beside_bars
from esm_neuron.errors import EsmNeuronError
from esm_neuron.redact import Lines, RedactedRecord, RedactingFormatter, redact, shown
from esm_neuron.training.signals import EXIT_STOPPED

Trained = Annotated[str, "output folder of a training run, or a folder with a trained model by transformers or PEFT"]
AnyModel = Annotated[str, "output folder of a training run, folder of an ESM-2 by transformers or PEFT, or hub id"]
Records = Annotated[Path, "FASTA, CSV, TSV, JSONL or Parquet"]
Table = Annotated[Path, "file to write: CSV, TSV, JSONL or Parquet, by its suffix"]
Backend = Annotated[BackendName | None, f"where to run: {', '.join(BACKENDS)}; default: where it was trained, else cpu"]
Resume = Annotated[bool, "go on with the shards that a killed command left"]
Repository = Annotated[str | None, "OWNER/NAME on the Hugging Face hub to upload it to, private where it is new"]
Public = Annotated[bool, "with --push-to-hub: everybody may see it"]
AsJson = Annotated[bool, "print JSON instead of text"]


def train(*settings: str) -> int:
    """Fine-tune an ESM-2 on proteins with labels; write weights, metrics and predictions to --output.

    Told of nothing but data, task, model and output, it fits a probe, in minutes.

    Examples:
      esm-neuron train my.csv --label location --model facebook/esm2_t12_35M_UR50D --output runs/mine
      esm-neuron train --config configs/start.yaml --data my.csv --lr 3e-4 --epochs 5 --output runs/mine
    """
    from esm_neuron.tasks import training_config

    cfg = training_config(settings, lambda line: _on_main(log, line))
    from esm_neuron.training.run import train as run_training

    if stopped := run_training(cfg, log).stopped_by:
        log(f"stopped by {stopped}; the state is saved, go on with --checkpoint.resume auto")
        return EXIT_STOPPED
    if cfg.adapter.kind == "probe" and (cfg.data.folds is None or cfg.data.fold is not None):
        from esm_neuron.reports.advice import fine_tuning

        _on_main(log, f"to fine-tune from here: {fine_tuning(Path(cfg.output), f'{cfg.output}-lora')}")
    return 0


def new(
    file: Annotated[str, "proteins, as data.train: FASTA, CSV, TSV, JSONL, Parquet, several of them"],
    *,
    output: Annotated[Path, "YAML file to write"] = Path("config.yaml"),
) -> int:
    """Look at a file of proteins and propose a run: task, columns, split and settings, as a YAML with comments.

    It says what it could not decide. Exits with 1 where the file has faults that training refuses.

    Examples:
      esm-neuron new my.csv
      esm-neuron new my.fasta --output runs/mine.yaml && esm-neuron train --config runs/mine.yaml
    """
    require(not os.path.lexists(output), f"--output {output}: exists already; name another file")
    from esm_neuron.files import write_text
    from esm_neuron.planning.propose import propose

    made = propose(file)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, made.yaml())
    show(Lines.of(made.yaml().rstrip().split("\n")))
    mend = "mend the file as told above, then" if made.faults else "next:"
    log(f"written to {output}; {mend} esm-neuron train --config {output}")
    return 1 if made.faults else 0


def tune(
    *settings: str,
    trials: Annotated[int, "trials in the end, those of a search that goes on included"] = 20,
    budget: Annotated[str | None, "time after which no trial begins: 90s, 30m, 1h30m; default: none"] = None,
    jobs: Annotated[int, "processes that run trials side by side"] = 1,
    space: Annotated[Path | None, "YAML with a range per setting, see docs/tuning.md; default: by adapter.kind"] = None,
) -> int:
    """Search for good settings by validation proteins; write a table, a plot and best.yaml to --output.

    Settings are those of train, which every trial starts from. Test proteins are not looked at.

    Examples:
      esm-neuron tune --config configs/start.yaml --data my.csv --trials 20 --budget 30m --output runs/search
      esm-neuron train --config runs/search/best.yaml
    """
    from esm_neuron.config.rules import seconds
    from esm_neuron.config.settings import parse

    cfg = parse(settings, "tune")
    from esm_neuron.training import tune as search

    stopped_by = search.tune(cfg, trials, seconds(budget) if budget is not None else None, jobs, space, log)
    if stopped_by:
        log(f"stopped by {stopped_by}; the trials are saved, go on with --checkpoint.resume auto")
        return EXIT_STOPPED
    return 0


def evaluate(
    *overrides: str,
    model: Trained,
    input: Annotated[Path, "file with labels; columns as in training"],
    output: Annotated[Path | None, "JSON file; printed as well"] = None,
    backend: Backend = None,
) -> int:
    """Print the metrics of a trained model on a labelled file, as JSON.

    Examples:
      esm-neuron evaluate --model runs/mine --input heldout.csv
      esm-neuron evaluate --model runs/mine --input heldout.tsv --label location --output metrics.json
    """
    from esm_neuron.inference.evaluate import evaluate as run_evaluation

    _on_main(show, as_json(run_evaluation(model, input, output, backend, log, overrides)))
    return 0


def predict(
    *overrides: str,
    model: Trained,
    input: Records,
    output: Table,
    coverage: Annotated[
        float | None, "such as 0.9: also the classes (set), or the range (low, high), that hold the truth that often"
    ] = None,
    backend: Backend = None,
    resume: Resume = False,
) -> int:
    """Predict with a trained model for every record of a file.

    Examples:
      esm-neuron predict --model runs/mine --input new.fasta --output predictions.csv
      esm-neuron predict --model runs/mine --input new.csv --output p.parquet --sequence_column seq --coverage 0.9
    """
    from esm_neuron.inference.predict import predict as run_prediction

    written = run_prediction(
        model, input, output, backend=backend, settings=overrides, resume=resume, coverage=coverage, log=log
    )
    _on_main(log, f"{written} predictions written to {output}")
    return 0


def embed(
    *overrides: str,
    model: AnyModel,
    input: Records,
    output: Annotated[Path, "file to write: .parquet, .safetensors or .h5"],
    pooling: Annotated[
        Literal["mean", "cls", "residue"],
        "one vector per protein, the mean of its residues or the state of <cls>; or one per residue",
    ] = "mean",
    backend: Backend = None,
    resume: Resume = False,
) -> int:
    """Embed every record of a file with a pretrained or a trained model.

    Examples:
      esm-neuron embed --model facebook/esm2_t33_650M_UR50D --input new.fasta --output means.parquet
      esm-neuron embed --model runs/mine --input new.fasta --output residues.safetensors --pooling residue
    """
    from esm_neuron.inference.embed import embed as run_embedding

    written = run_embedding(model, input, output, pooling, backend=backend, settings=overrides, resume=resume, log=log)
    _on_main(log, f"{written} embeddings written to {output}")
    return 0


def score(
    *overrides: str,
    model: AnyModel,
    input: Annotated[Path, "table with one variant per row"],
    output: Table,
    method: Annotated[
        Literal["wild-type-marginal", "masked-marginal", "single-site-marginal", "pseudo-perplexity"],
        "from one pass, one per distinct set of residues, one per distinct residue (as ProteinGym), or one per residue "
        "of every variant",
    ] = "masked-marginal",
    wild_type: Annotated[Path | None, "file with the one protein that variants are named after"] = None,
    variant_column: Annotated[str, "substitutions such as A42G:L50P"] = "variant",
    sequence_column: Annotated[str | None, "whole sequences, read instead of --variant-column"] = None,
    score_column: Annotated[str | None, "measured values; prints the rank correlation with them as JSON"] = None,
    first_residue: Annotated[int, "number of the wild type's first residue"] = 1,
    backend: Backend = None,
    resume: Resume = False,
) -> int:
    """Score every variant of a table without training, by the language-model head.

    Examples:
      esm-neuron score --model facebook/esm2_t33_650M_UR50D --input v.csv --wild_type w.fasta --output scored.csv
      esm-neuron score --model mini --input dms.csv --sequence_column mutated --score_column fitness --output s.csv
    """
    from esm_neuron.inference.score import score as run_scoring
    from esm_neuron.inference.variants import VariantColumns

    found = run_scoring(
        model,
        input,
        output,
        method,
        wild_type=wild_type,
        columns=VariantColumns(variant_column, sequence_column, score_column),
        first_residue=first_residue,
        backend=backend,
        settings=overrides,
        resume=resume,
        log=log,
    )
    _on_main(log, f"{found['rows']} scores written to {output}")
    if score_column:
        _on_main(show, as_json(found))
    return 0


def report(run: Annotated[Path, "output folder of a training run; the page is written to its report/"]) -> int:
    """Write a finished run as one HTML page, with its charts as PNG: curves, metrics, calibration, errors.

    Examples:
      esm-neuron report runs/mine
      esm-neuron report runs/mine && xdg-open runs/mine/report/index.html
    """
    from esm_neuron.reports import write_report

    log(f"report written to {write_report(run)}")
    return 0


def compare(
    runs: Annotated[list[Path], "output folders of finished runs, two or more"],
    *,
    output: Annotated[Path, "HTML page to write"] = Path("compare.html"),
) -> int:
    """Write runs on the same test proteins as one HTML page: paired differences, curves, settings that differ.

    Examples:
      esm-neuron compare runs/probe runs/lora
      esm-neuron compare runs/seed-1 runs/seed-2 runs/seed-3 --output seeds.html
    """
    from esm_neuron.reports.compare import write_comparison

    log(f"comparison written to {write_comparison(runs, output)}")
    return 0


def serve(
    model: Trained,
    *overrides: str,
    host: Annotated[str, "address to listen at; 0.0.0.0: all of this machine's"] = "127.0.0.1",
    port: Annotated[int, "port to listen at; 0: any that is free"] = 8080,
    backend: Backend = None,
    megabytes: Annotated[float, "largest request"] = 8,
    proteins: Annotated[int, "most proteins of a request"] = 10_000,
    seconds: Annotated[float, "longest time until an answer"] = 60,
) -> int:
    """Answer requests for predictions and embeddings over HTTP, with a form to paste proteins into.

    Examples:
      esm-neuron serve runs/mine
      esm-neuron serve /opt/ml/model --host 0.0.0.0 --port 8080 --backend cuda
    """
    from esm_neuron.inference.server import Limits
    from esm_neuron.inference.server import serve as run_server
    from esm_neuron.inference.serving import load

    limits = Limits(megabytes, proteins, seconds)
    limits.check()
    run_server(load(model, backend, overrides, "serve"), Path(model).resolve().name, host, port, limits, log)
    return 0


def export(
    *overrides: str, model: Trained, output: Annotated[Path, "folder to write"], push_to_hub: Repository = None,
    public: Public = False,
) -> int:  # fmt: skip
    """Merge an adapter into its base and write a Hugging Face folder, of a run with a model card.

    Examples:
      esm-neuron export --model runs/mine --output merged --push-to-hub OWNER/NAME
      esm-neuron export --model some/peft-adapter --output merged --base facebook/esm2_t12_35M_UR50D
    """
    from esm_neuron.inference.export import export as run_export

    run_export(model, output, overrides, push_to_hub, public, log)
    return 0


def convert(
    source: Annotated[Path, "folder with pytorch_model*.bin and config.json"],
    target: Annotated[Path, "folder to write"],
) -> int:
    """Turn a folder of PyTorch pickle shards into sharded safetensors.

    Examples:
      hf download facebook/esm2_t36_3B_UR50D --local-dir pickles && esm-neuron convert pickles safetensors
      esm-neuron train my.csv --model safetensors --output runs/mine
    """
    from esm_neuron.models.convert import convert as run_conversion

    run_conversion(source, target)
    log(f"safetensors written to {target}")
    return 0


def plan(
    *settings: str,
    devices: Annotated[int, "data-parallel devices of the run"] = 1,
    instance: Annotated[str | None, "add time and cost: ml.trn1.32xlarge (SageMaker), trn1.32xlarge (EC2)"] = None,
    nodes: Annotated[int, "instances of the job"] = 1,
    prices: Annotated[Path | None, "price list; default: the one of this package, which is dated"] = None,
    answers: Annotated[int | None, "add what predictions for so many proteins cost on each instance"] = None,
    json_: AsJson = False,
) -> int:
    """Show packs, graphs, memory, time and dollars of a run before it starts.

    Examples:
      esm-neuron plan my.csv --model facebook/esm2_t33_650M_UR50D
      esm-neuron plan --config configs/localization_650m_trn1.yaml --instance ml.trn1.32xlarge --answers 100000000
    """
    from esm_neuron.config import rules
    from esm_neuron.config.settings import parse

    cfg = parse(settings, "plan")
    rules.validate(cfg)
    require(devices >= 1, f"--devices {devices} must be at least 1")
    require(nodes >= 1, f"--nodes {nodes} must be at least 1")
    require(answers is None or answers >= 1, f"--answers {answers} must be at least 1")
    from esm_neuron.data.splits import load_splits
    from esm_neuron.planning.answers import answered
    from esm_neuron.planning.cost import priced
    from esm_neuron.planning.plan import make_plan, metrics, render
    from esm_neuron.tasks import check_task, task_class

    check_task(cfg.task)
    with TemporaryDirectory(prefix="esm-neuron-") as spool:  # a plan needs the lengths, and memory no more than these
        made = make_plan(cfg, load_splits(cfg, task_class(cfg.task.name).labels_of(cfg.task), Path(spool)), devices)
    values, lines = metrics(made), [render(made)]
    if instance is not None:
        estimates, told = priced(cfg, made, instance, prices, nodes)
        values["estimates"] = [asdict(each) for each in estimates]
        lines += told
    if answers is not None:
        costs, told = answered(cfg, made, answers, prices, instance)
        values["answers"] = [asdict(each) for each in costs]
        lines += told
    show(as_json(values) if json_ else Lines.of(lines))
    return 0


def compile_(*settings: str) -> int:
    """Compile the graphs of a run ahead of it, on xla or neuron, with the flags of the training to come.

    Examples:
      esm-neuron compile --config configs/demo.yaml --backend xla
      neuron_parallel_compile torchrun --nproc_per_node 32 -m esm_neuron.cli compile --config run.yaml
    """
    from esm_neuron.config.settings import parse

    cfg = parse(settings, "compile")
    from esm_neuron.training.run import compile_graphs

    log(f"{compile_graphs(cfg, log)} graphs compiled")
    return 0


def doctor(
    *,
    backend: Annotated[
        BackendName | None, f"this one alone; exit with 1 if it cannot run here: {', '.join(BACKENDS)}"
    ] = None,
    config: Annotated[Path | None, "YAML of a run, which decides the variables that are set"] = None,
    json_: AsJson = False,
) -> int:
    """Show what this machine can run, what is installed, and what each backend lacks.

    Examples:
      esm-neuron doctor
      esm-neuron doctor --backend neuron --config run.yaml
    """
    from esm_neuron.planning.doctor import examine, render

    cfg = TrainConfig(backend=backend or TrainConfig.backend)
    if config is not None:
        from esm_neuron.config.settings import read_config

        cfg = read_config(config)
    found = examine(cfg, [backend] if backend else BACKENDS)
    show(as_json(asdict(found)) if json_ else render(found))
    return 1 if backend and found.lacks[backend] else 0


def data_check(
    file: Annotated[str, "as data.train: FASTA, CSV, TSV, JSONL, Parquet, several of them, a saved dataset, hf://..."],
    *settings: str,
    train: Annotated[str, "value of the split column for training records"] = "train",
    homologs: Annotated[Literal["kmer", "mmseqs", "off"], "how homologs in training are found"] = "kmer",
    json_: AsJson = False,
) -> int:
    """Show lengths, alphabet, repeats, labels, conflicts, leaks and faults of a file; exit with 1 if it has faults.

    Examples:
      esm-neuron data check my.csv
      esm-neuron data check my.tsv --label location --split_column set --sequence_column seq
    """
    from esm_neuron.config.settings import in_full, override
    from esm_neuron.data.check import CHECKED, check_file

    cfg = override(TrainConfig(), settings, ("config", *CHECKED), "data check")
    from esm_neuron.data.sources import has_labels
    from esm_neuron.tasks import check_task, task_class

    check_task(cfg.task)
    kind = task_class(cfg.task.name).labels_of(cfg.task)
    label_given = any(word.startswith("--data.label_column") for word in in_full(settings))
    asked = cfg.data.label_column != DataConfig.label_column or label_given or cfg.task != TaskConfig()
    require(kind is not None or not label_given, f"--task {cfg.task.name} reads no labels; leave out --label_column")
    labels = kind.of(cfg.task, cfg.data) if kind and (asked or has_labels(file, cfg.data)) else None
    found = check_file(file, cfg.data, labels, train, None if homologs == "off" else homologs)
    if kind is not None and labels is None:
        column = cfg.data.label_column
        log(f"NOTE: nothing of labels was checked: no column {column!r}; name theirs with --label_column")
    show(as_json(asdict(found)) if json_ else found.render())
    return 1 if found.faults else 0


_FUNCTIONS = (
    train, new, tune, evaluate, predict, embed, score, report, compare, serve, export, convert, plan, compile_, doctor,
    data_check,
)  # fmt: skip
COMMANDS: dict[str, Callable[..., int]] = {one.__name__.rstrip("_").replace("_", " "): one for one in _FUNCTIONS}
"""Command -> function that returns the exit code. Keyword-only parameters are flags; `*settings` takes any setting of a
run, `*overrides` those that may change for a trained model."""


def _taken(name: str) -> Sequence[str]:
    """Return the settings that a command takes, a section by its name and a point; of a run it is none of them."""
    from esm_neuron.data.check import CHECKED
    from esm_neuron.inference.load import MAY_CHANGE

    return CHECKED if name == "data check" else (*MAY_CHANGE[name], "model.base", "model.revision", "task.")


def call(name: str, words: Sequence[str]) -> int:
    """Run a command with the words after its name; return the exit code."""
    words = [
        re.sub(r"^(--[\w.-]+=)?~(?=/|$)", lambda found: (found[1] or "") + os.path.expanduser("~"), w) for w in words
    ]
    for word in words:
        sound = not any("\ud800" <= character <= "\udfff" for character in word)
        require(sound, f"{word} is not of this locale's encoding; rename the file, or set LC_ALL=C.UTF-8")
    command = COMMANDS[name]
    told = help_of(name, command, words, lambda: _taken(name))
    if told is not None:
        show(Lines(told.rstrip()))
        return 0
    parser, parameters = command_parser(name, command), inspect.signature(command).parameters
    if "settings" not in parameters and "overrides" not in parameters:
        return command(**vars(parser.parse_args(words)))
    args, rest = parser.parse_known_args(words)
    if any(word.partition("=")[0] in RENAMED for word in rest):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    named = vars(args)
    first = [named.pop(key) for key, each in parameters.items() if each.kind is each.POSITIONAL_OR_KEYWORD]
    return command(*first, *rest, **named)


def log(line: str) -> None:
    """Write a line for a person to stderr, see `redact.shown`, in one write."""
    with contextlib.suppress(OSError), beside_bars():  # a reader that went away, or a full disk, ends no work
        sys.stderr.write(shown(line) + "\n")
        sys.stderr.flush()


def show(text: str) -> None:
    """Print what a command was asked for, see `redact.shown`."""
    print(shown(text))


def as_json(value: object) -> Lines:
    """Return a value as indented JSON, whose strings hold no control character and no letter beyond ASCII."""
    return Lines(json.dumps(value, indent=2))


def _on_main(write: Callable[[str], None], text: str) -> None:
    """Write a text in the only process, or in torchrun's first one, which writes for all."""
    if os.environ.get("RANK", "0") == "0":
        write(text)


def show_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Show a traceback without secrets, as `sys.excepthook`."""
    text = "".join(traceback.format_exception(kind, error, trace)).rstrip()
    log(Lines.of(redact(text).split("\n")))  # whole: a key has several lines


def show_failure(failed: threading.ExceptHookArgs) -> None:
    """Show what failed in a thread, as `threading.excepthook`; an error of the file system is one line."""
    if isinstance(failed.exc_value, OSError):
        log(f"WARNING: {failed.thread and failed.thread.name}: {failed.exc_value}")
    elif failed.exc_value is not None:
        show_traceback(failed.exc_type, failed.exc_value, failed.exc_traceback)


SMALLER = "lower data.pack_tokens, data.max_segments, loop.packs_per_device or adapter.r, or free memory"
"""The cure where memory does not suffice."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code of the process. A known error is one line."""
    if argv is None:  # run as a program: a traceback may quote a URL with a secret
        sys.excepthook, threading.excepthook = show_traceback, show_failure
        logging.captureWarnings(True)  # warnings become log lines, which are redacted
        prepare()
    for stream in (sys.stdout, sys.stderr):  # a locale may lack what an id or a label has
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        code = run(argv)
        sys.stdout.flush()
        if argv is None:
            gc.freeze()  # Python looks for garbage once more at its end, in a million objects
        return code
    except BrokenPipeError:  # the reader, such as `head`, wants no more
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes stdout at its end, and would complain
        return 128 + signal.SIGPIPE
    except EsmNeuronError as error:
        text = error.args[0] if error.args else ""
        head = "esm-neuron: error: "
        log(Lines(head + text) if isinstance(text, Lines) else f"{head}{error}")
        return error.exit_code
    except UnicodeEncodeError as error:
        log(f"esm-neuron: error: {error.object[:100]!r} has no place in {error.encoding}; set LC_ALL=C.UTF-8")
        return 2
    except MemoryError as error:
        log(f"esm-neuron: error: out of memory ({error}); {SMALLER}")
        return 2
    except RuntimeError as error:
        if not re.search("out of memory|can't allocate memory|not enough memory", str(error)):
            raise
        log(f"esm-neuron: error: out of memory ({str(error).partition(chr(10))[0]}); {SMALLER}")
        return 2
    except OSError as error:  # a disk that is full, a folder that cannot be written
        log(f"esm-neuron: error: {error}; free space, or fix the path or its permissions")
        return 2
    except KeyboardInterrupt:  # ctrl-C where no step has to be finished first
        log("esm-neuron: stopped by SIGINT")
        return 128 + signal.SIGINT


def run(argv: Sequence[str] | None = None) -> int:
    """Run one command as `main` does, for callers that report an EsmNeuronError or OSError themselves."""
    words = list(sys.argv[1:] if argv is None else argv)
    length = 2 if words[:1] == ["data"] else 1
    name, rest = " ".join(words[:length]), words[length:]
    if name in ("", "data", "help") or {"-h", "--help"} & set(words[:length]):
        print(usage(COMMANDS))
        return 0 if words else 2
    if name == "--version":
        from esm_neuron import __version__

        print(__version__)
        return 0
    if name not in COMMANDS:
        cure = f"{instead(name, COMMANDS)}the commands are {', '.join(COMMANDS)}"
        log(f"esm-neuron: error: unknown command {name!r}; {cure}")
        return 2
    logging.setLogRecordFactory(RedactedRecord)  # libraries have loggers and handlers of their own
    handler = logging.StreamHandler()
    handler.setFormatter(RedactingFormatter("%(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    return call(name, rest)


if __name__ == "__main__":
    sys.exit(main())
