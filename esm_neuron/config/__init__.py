"""The configuration tree: one frozen dataclass per section, each field with its meaning and unit.

This module imports no torch, so that `esm-neuron --help` and a launcher on a login node answer at once. `settings`
reads files and flags; `rules` checks ranges and what a single field cannot know.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from esm_neuron.config.backends import spec_of
from esm_neuron.errors import ConfigError

BackendName = str
"""A name of the table in `config/backends.py`."""
Quantization = Literal["nf4", "int8"]
OnRecompile = Literal["error", "warn", "ignore"]
OnNonfinite = Literal["stop", "skip"]
Tracing = Literal["once", "always", "compare"]
Text = str | int | float | bool
"""A value of a column, which is text; YAML makes numbers of 0 and 1.5, and they are text again in a `DataConfig`."""
SplitNames = Text | tuple[Text, ...]
"""A value of the split column, or several."""
EVERY_LAYER = ("mix", "concat")
"""Values of `model.layers` with which a head reads every layer."""


AUTO_MODEL = "auto"
"""The `model.name` that `models.hub` decides."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The ESM-2 to start from."""

    name: str = AUTO_MODEL
    """A hub id (`facebook/esm2_t33_650M_UR50D`), a local Hugging Face folder, a folder of PEFT (its adapter is merged
    into its base), or a shape: `tiny`, `small`, `mini`, `esm2_t6_8M`, `esm2_t12_35M`, `esm2_t30_150M`,
    `esm2_t33_650M`, `esm2_t36_3B`, `esm2_t48_15B`. A shape needs `init: random`; only `mini` has weights in the
    package, which this project trained and which know hardly more than composition. `auto`: Meta's 8M
    (`facebook/esm2_t6_8M_UR50D`) where the hub answers or its cache has it, else `mini`; what it was is saved with the
    run."""
    base: str | None = None
    """Where `name` is a folder of PEFT: hub id or folder of the weights that its adapter was trained on. None: those
    that its adapter_config.json names."""
    revision: str | None = None
    """Hub revision: a branch, a tag or, best, a commit hash. None is the hub's main branch."""
    sha256: str | None = None
    """SHA-256 that the weights must have, in hexadecimal: that of model.safetensors, or adapter_model.safetensors, as
    the hub and sha256sum show it; of shards, that of their sorted sums, one per line. None: any."""
    init: Literal["pretrained", "random"] = "pretrained"
    """`pretrained` loads weights; `random` keeps only the shape of `name` and initializes newly from `seed`."""
    layers: int | Literal["all", "mix", "concat", "auto"] = "all"
    """What the head reads. A number: the encoder is cut off after so many blocks, which saves their work and their
    memory in training, prediction and export. `all`: every block is kept, and the last one is read. Tasks with one
    vector per protein can read the pooled states of every layer, the embedding among them: `concat`, side by side, or
    `mix`, a mean with learned weights (a softmax). `auto`, with adapter.kind=probe: `concat`, or where
    that cannot be (a label per residue; more than a gigabyte) the number with the least loss on other families."""
    pooling: Literal["mean", "cls", "attention", "mean+termini"] = "mean"
    """How the residues of a protein become one vector: their mean (specials left out), the <cls> position, a mean with
    learned weights, or three means side by side, over all residues, the first 50 and the last 50 (of what the model is
    given). `cls` is what transformers' EsmForSequenceClassification does."""
    composition: bool = False
    """Give the head of a task with one vector per protein also the shares of the 20 amino acids, over what `pooling`
    takes means of, and the logarithm of the number of residues."""
    head: Literal["tanh", "linear"] | None = None
    """What predicts from the vector of a protein: a linear layer, tanh and a linear layer, as transformers has it; or
    one linear layer. None: `linear` with adapter.kind=probe, which can fit nothing else, otherwise `tanh`."""
    dropout: float = 0.0
    """Dropout probability of hidden states, attention and classification head (ESM-2 was trained with 0)."""
    gradient_checkpointing: bool = False
    """Keep only the input of each block and recompute the rest in the backward pass: less memory, a third slower."""


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """What is learned."""

    name: str = "sequence_classification"
    """What is learned: `sequence_classification`, one class per protein; `multi_label`, any number of labels per
    protein; `regression`, a number per protein; `residue_classification`, one class per residue; or `masked_lm`, the
    residues hidden from the model."""
    labels: tuple[str, ...] | None = None
    """Class names in the order of the outputs. None takes the sorted labels of the training proteins."""
    class_weights: Literal["none", "balanced", "auto"] | dict[str, float] = "none"
    """How much an error counts by its true class: alike; `balanced` by the training proteins, n / (classes x n_c);
    `auto`, the square roots of these (at most 10) where the largest class has three times as many proteins as the
    smallest, else alike; or a weight for every class. multi_label: how much a missed label counts, `balanced` negatives
    / positives."""
    label_smoothing: float = 0.0
    """Share of the target probability spread evenly over the classes, 0 to 1."""
    focal_gamma: float = 0.0
    """Focal loss (arXiv:1708.02002): a class's loss is multiplied by (1 - its probability)^gamma; 0: cross entropy."""
    ignore: tuple[str, ...] | None = None
    """residue_classification: labels of residues about which nothing is known; they are counted, and neither learned
    nor scored. None: `?`, `.` and `-`, but where more than a tenth of the residues have `-`, which many files write for
    a class (coil, no signal), that is an error: name them, with `-` or without."""
    target_mean: float | None = None
    """regression: what is subtracted from values before training; None: the mean of the training proteins. Predictions
    and metrics are in the values' own unit."""
    target_sd: float | None = None
    """regression: what values are divided by; None: the standard deviation of the training proteins."""
    mask_probability: float = 0.15
    """masked_lm: share of residues chosen as targets; in training 80 % become <mask>, 10 % a random
    residue, 10 % stay, and in evaluation all become <mask>."""
    mask_rates: dict[str, float] | None = None
    """masked_lm: this share by region, such as `{cdr: 0.4, framework: 0.1}`; the label column then names the region of
    each residue, and has no others (`?`: never a target). None: `mask_probability` everywhere."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Files, columns, splits, filters, and how sequences are packed."""

    train: str | None = None
    """Training file: CSV, TSV, FASTA or JSONL, plain or .gz; Parquet; a folder that `Dataset.save_to_disk` wrote; or
    `hf://owner/name@revision/split` on the hub. With `split_column`, the one file that holds all splits. Several files
    are read as one: a folder of them, a pattern `shards/*.csv`, a list `[a.csv, b.csv]` (in YAML in quotes), or one
    per class, `{membrane: a.fasta, other: b.fasta}`."""
    valid: str | None = None
    """Validation file. None: taken from `split_column`, or sampled from `train` by `valid_fraction`."""
    test: str | None = None
    """Test file. None: taken from `split_column` where there is one, else there is no test."""
    positives: str | None = None
    """File of the proteins of class `positive`; with `negatives` in place of `train`."""
    negatives: str | None = None
    """File of the proteins of class `negative`."""
    sheet: str | None = None
    """Sheet of an Excel workbook (.xlsx, needs openpyxl). None: its only one."""
    id_column: str = "id"
    """Column with the record's name; left alone, a table may also have `Entry` or `ACC`, or none: then records are
    named by their number. In FASTA the name is the header's first word and this is ignored."""
    sequence_column: str = "sequence"
    """Column with the amino-acid sequence, or with ESM's tokens (`input_ids`). Ignored in FASTA. `[heavy, light]` (in
    YAML in quotes) names columns of chains, which become one sequence with <eos> between, as transformers' tokenizer
    joins a pair: for masked_lm and embeddings."""
    label_column: str = "label"
    """Column with the label; `[A, B]` (in YAML in quotes) names columns that have 0 or 1, one per class. In FASTA the
    key of a `key=value` header field, `part2` for what follows the first bar of a name, or `line3` for a line below
    the residues."""
    label_separator: str | None = None
    """What stands between the labels of a protein or of its residues. None: `;`, of residues `,`."""
    mask_column: str | None = None
    """residue_classification: column with 0 for each residue whose label is not used, 1 for the others."""
    split_column: str | None = None
    """Column (or FASTA header key) that says which split a protein belongs to. None: splits are files or sampled."""
    split_names: tuple[SplitNames, SplitNames, SplitNames] = ("train", "valid", "test")
    """The values of `split_column` for training, validation and test proteins, several of them as a list; capital and
    small letters are one, and so are 1 and 1.0. The default also knows `val`, `validation`, `dev`, `training` and
    `testing`."""
    valid_column: str | None = None
    """Column that is true for those training proteins that are for validation, as FLIP's `validation`."""
    fold: str | int | None = None
    """Cross-validation: the value of `split_column` that is tested on; all others are for training, from which
    `valid_fraction` is sampled. With `folds`: the number of the fold, from 1."""
    folds: int | None = None
    """Cross-validation without a column: the training proteins are cut into so many folds, each class in proportion
    and, with `sample: clusters`, homologs together. Without `fold` there is a run per fold, each tested on its own fold
    and chosen by `valid_fraction` of the others; their mean and spread are in `output`/folds.json."""
    valid_fraction: float = 0.1
    """Share of training proteins sampled for validation, by `seed`, if neither file nor column gives any, 0 to 1."""
    test_fraction: float = 0.0
    """Share of training proteins sampled for the test, after the validation proteins, 0 to 1."""
    sample: Literal["proteins", "clusters"] = "proteins"
    """What `valid_fraction`, `test_fraction` and `folds` sample: proteins, each class in proportion; or whole clusters
    of homologs (found as `homologs` says), so that no sampled protein has a homolog in training. Clusters are chosen so
    that each class is within a fifth of its share, or a warning says what was wanted and what there is."""
    sample_seed: int | None = None
    """Seed of what `valid_fraction`, `test_fraction` and `folds` sample. None: `seed`."""
    unique_column: str | None = None
    """Keep the first protein of each value of this column, such as `sequence`; the others are counted and left out."""
    max_rows: int | None = None
    """Keep the first so many training proteins; the others are counted and left out. None: all."""
    keep: dict[str, list[Text]] = field(default_factory=dict)
    """Filter for every split: column -> values to keep; others are counted and left out."""
    keep_heldout: dict[str, list[Text]] = field(default_factory=dict)
    """Filter for validation and test proteins only, such as `{leaky: ["false"]}` for the clean ones."""
    homologs: Literal["kmer", "mmseqs", "off"] = "kmer"
    """How validation and test proteins with a homolog in training are found: by k-mers, by MMseqs2 if it is installed,
    or not at all. They are counted, and metrics are also given without them."""
    on_bad_residue: Literal["strict", "skip", "replace", "strip"] = "strict"
    """What to do with a character outside the ESM alphabet: stop, leave the protein out, write X, or take gaps, blanks,
    digits and `*` out and stop at others. All but the first are counted. A `*` at the very end is always taken off."""
    on_missing: Literal["strict", "skip"] = "strict"
    """What to do with a protein that has no sequence or no label: stop, or leave it out and count it."""
    cache: str | None = None
    """Folder that keeps tokenized data by content, as files mapped into memory: made once, shared by runs and
    processes; needed for files larger than memory. It also keeps the pooled states of probes, in `features`. None:
    every process tokenizes and holds the data in memory, and pooled states are kept in `output`/features."""
    min_residues: int = 1
    """Shortest sequence; shorter ones are left out and counted."""
    max_residues: int = 1022
    """Longest sequence given to the model, in residues; <cls> and <eos> come on top."""
    long_sequences: Literal["refuse", "skip", "crop", "crop_ends", "window"] = "crop"
    """What to do with a longer sequence: stop, leave it out, keep its first residues, keep its two ends (sorting
    signals sit at the termini), or average over overlapping windows. Counted and printed in every case."""
    window_overlap: int = 128
    """Residues that neighbouring windows share."""
    packing: bool = True
    """Put several sequences end to end into a pack (almost no padding). False: one sequence per pack."""
    pack_tokens: int = 1024
    """Length of a pack in tokens, special tokens included. At least `max_residues` + 2."""
    max_segments: int = 32
    """Most sequences in one pack; a fixed number, so that pooling has one shape."""

    def __post_init__(self) -> None:
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        if self.positives is not None and self.negatives is not None and self.train is None:
            put("train", f"{{positive: {self.positives}, negative: {self.negatives}}}")
            put("positives", None)
            put("negatives", None)
        for name in ("keep", "keep_heldout"):
            put(name, {column: [str(value) for value in values] for column, values in getattr(self, name).items()})
        put("fold", None if self.fold is None else str(self.fold))
        put(
            "split_names",
            tuple(tuple(map(str, n)) if isinstance(n, (list, tuple)) else str(n) for n in self.split_names),
        )

    @property
    def split_values(self) -> list[tuple[str, ...]]:
        """Return the values of the split column for training, validation and test."""
        return [tuple(map(str, of)) if isinstance(of, (list, tuple)) else (str(of),) for of in self.split_names]

    @property
    def label_columns(self) -> tuple[str, ...]:
        """Return the columns with the labels: one, or one per class."""
        return _several(self.label_column)

    @property
    def sequence_columns(self) -> tuple[str, ...]:
        """Return the columns with the sequences: one, or one per chain."""
        return _several(self.sequence_column)


def _several(columns: str) -> tuple[str, ...]:
    if columns[:1] + columns[-1:] == "[]":
        return tuple(name.strip(" '\"") for name in columns[1:-1].split(","))
    return (columns,)


COMPARED_BY_CONTENT = frozenset((
    "train", "valid", "test", "positives", "negatives", "sheet", "id_column", "sequence_column", "label_column",
    "label_separator", "mask_column", "split_column", "split_names", "valid_column", "fold", "valid_fraction",
    "test_fraction", "sample", "sample_seed", "folds", "unique_column", "max_rows", "keep", "keep_heldout",
    "on_bad_residue", "on_missing", "min_residues",
))  # fmt: skip
"""Fields of `DataConfig` that say which proteins are read, and from where: all that they do is seen in the proteins.
What is gone on with, a run or predictions, compares these by a hash and may change such a field."""


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Which parameters are trained."""

    kind: Literal["none", "head", "lora", "qlora", "probe"] = "lora"
    """What is trained: everything, the head alone, or low-rank adapters and the head; `qlora` keeps the frozen linears
    of the blocks quantized, on cpu and cuda. `probe`: a linear head, fitted at once to what the frozen encoder gives,
    which needs one forward pass per protein and no optimizer steps; its penalty is chosen on five folds of the training
    proteins by cluster."""
    init_from: str | None = None
    """Output folder of a run with adapter.kind `probe` or `head`, of the same task and weights: its head is what
    training starts from, and its `model.layers`, `pooling`, `composition` and `head` are taken with it."""
    quantization: Quantization = "nf4"
    """qlora: how frozen linears are kept: in 4 bits (NormalFloat with double quantization) or 8."""
    r: int = 8
    """LoRA rank."""
    alpha: int = 16
    """LoRA scale: the update is multiplied by alpha / r."""
    dropout: float = 0.0
    """Dropout probability on a LoRA layer's input."""
    targets: tuple[str, ...] = (
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    )
    """Linear layers of a block that get an adapter: names within the block. The default is all six."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model is spread over devices."""

    tp: int = 1
    """Tensor-parallel degree: how many devices share one copy of the model. The rest of the world is data-parallel."""
    pad_heads: bool = False
    """Add zero heads until `tp` divides their number (20 -> 24 at tp 8): the same outputs with some wasted work."""
    zero1: bool = True
    """neuron, adapter.kind none: each data-parallel rank keeps only its share of the optimizer state (ZeRO stage 1).
    What LoRA trains is so little that each rank keeps all of it."""
    fsdp: bool = False
    """cuda, cpu: each rank keeps its share of weights, gradients and optimizer state; a block is gathered while it
    computes (FSDP2). For models that do not fit on one device."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW, its learning rate and its schedule."""

    kind: Literal["adamw", "adamw8bit"] = "adamw"
    """`adamw8bit`, on cuda: moments in 8 bits, in memory that moves to the host when the GPU's is short."""
    lr: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.01
    """AdamW weight decay; biases and norms have none."""
    betas: tuple[float, float] = (0.9, 0.98)
    """AdamW's decay rates of the first and second moment."""
    eps: float = 1e-8
    """AdamW's denominator term."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after the warm-up."""
    warmup_steps: int = 0
    """Optimizer steps over which the rate rises linearly from 0."""
    warmup_ratio: float = 0.0
    """The same as a share of all steps, 0 to 1, where `warmup_steps` is 0."""
    min_lr_ratio: float = 0.0
    """Learning rate at the end of the schedule, as a share of `lr`."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 turns clipping off."""


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Steps, batches, precision, validation."""

    epochs: float = 1.0
    """Passes over the training proteins, if `max_steps` is not given."""
    max_steps: int | None = None
    """Optimizer steps; overrides `epochs`."""
    budget: str | None = None
    """Time for training, such as `90s`, `30m` or `1h30m`: the first steps are timed and forgotten, and as many as fit,
    with their validations and the last evaluation, become `max_steps` of the run that is saved. Reading data, baselines
    and export come on top."""
    min_steps: int = 0
    """Fewest optimizer steps: where `epochs` are fewer, training goes on with more passes over the proteins."""
    packs_per_step: int = 8
    """Packs in one optimizer step over all devices: the same on any number of devices."""
    packs_per_device: int = 8
    """Packs in one forward pass of one device. `packs_per_step` must be a multiple of this times the data-parallel
    degree; the factor is the number of accumulated passes."""
    eval_packs_per_device: int = 8
    """Packs in one forward pass of one device during evaluation and prediction."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """`bf16`: matrix products in bfloat16 by autocast and frozen linears stored so; trained weights stay float32."""
    tf32: bool = False
    """cuda, neuron: float32 matrix products in TensorFloat-32: faster, 10 bits of mantissa."""
    torch_compile: bool = False
    """cuda: compile each block with torch.compile, except its attention: minutes at the start."""
    optlevel: int = 2
    """neuron: level of optimization of neuronx-cc: 1 compiles soonest, 3 may run faster and compiles longest."""
    eval_every: int = 0
    """Optimizer steps between validations; 0: once per epoch."""
    min_evals: int = 1
    """Fewest validations in a run, evenly spaced: where `eval_every` gives fewer, they come more often."""
    patience: int = 0
    """Validations without improvement, of the metric or of the loss, after which training stops; 0: never."""
    tracing: Tracing = "once"
    """How often the operations of a graph are recorded, where graphs are compiled (xla, neuron): once, and the graph is
    run by its hash from then on; always, at each pass, which can take longer than the pass; or compare: the first three
    runs both ways and to the bit, with a warning and `always` where they differ."""
    on_recompile: OnRecompile = "error"
    """What to do when a training step or a validation after the first two compiles a graph, where shapes are static
    (xla, neuron): stop and name what changed, warn and go on, or nothing."""
    on_nonfinite: OnNonfinite = "stop"
    """What to do after a step whose loss or gradient is not finite: stop, or skip it and go on. Such a step never
    changes the weights, and its records are named in `output`/nonfinite.jsonl. Noticed at the next log line, evaluation
    or checkpoint."""
    watchdog: int = 0
    """Seconds that a step, a batch of an evaluation or a checkpoint may take before the process writes the stacks of
    its threads to stderr and `output`/hung-rank<N>.txt, and ends; 0: no limit."""
    watchdog_slow: int = 10_800
    """More seconds that the watchdog allows for what may compile (xla, neuron, torch_compile): the first two steps, the
    first evaluation and the first checkpoint; and, on every backend, for the start of a run (its data, weights and
    checkpoint) and for its end (the last evaluation, the baselines and the export)."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the state of a run is saved and which saves are kept."""

    every: int = 0
    """Optimizer steps between checkpoints; 0: at each validation."""
    keep: int = 2
    """Newest checkpoints kept; the best one is kept too."""
    resume: Literal["no", "auto"] = "no"
    """`auto` continues from the newest complete checkpoint in `output`, or starts anew if there is none."""
    asynchronous: bool = False
    """Write a checkpoint while training goes on. The next checkpoint, and the end of training, wait for it and raise
    its error."""


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is written while training."""

    every: int = 10
    """Optimizer steps between lines of metrics.jsonl."""
    score_test: bool = True
    """Open the test proteins at the end. False: they are held out as always and dropped unseen, as in every trial of
    `esm-neuron tune`."""
    baselines: bool = True
    """Also score baselines that need no network (frequencies, composition) on the same proteins at the end."""
    predictions: bool = True
    """Keep the predictions for validation and test records in `output`/predictions-valid.parquet and
    predictions-test.parquet, which `esm-neuron report` draws. Classes of residues take 4 bytes per residue and
    class."""
    tensorboard: bool = True
    """Write TensorBoard event files under `output`/tensorboard."""
    wandb: str | None = None
    """Project of Weights & Biases, or TEAM/PROJECT, that is told settings, metrics, the result and its report, see
    docs/trackers.md. WANDB_MODE=offline keeps them under `output`/wandb. None: wandb is not imported."""
    mlflow: str | None = None
    """Experiment of MLflow that is told the same, at the server that MLFLOW_TRACKING_URI names. None: mlflow is not
    imported."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A fine-tuning run of ESM-2."""

    output: str = "out"
    """Folder for everything the run writes."""
    backend: str = "cpu"
    """Where to run: `cpu`, `cuda` (NVIDIA GPUs), `xla` (any torch_xla device: XLA:CPU, TPU) or `neuron` (Trainium).
    Never chosen silently."""
    seed: int = 42
    """Seed of weights, splits, order, masks and dropout."""
    seeds: int = 1
    """More than 1: an ensemble of so many runs, with `seed` and those after it, on the same proteins, each in a folder
    of `output` such as seed-42. `predict` averages their predictions and says how far they are apart; result.json has
    the metrics of the average, and the mean and spread of those by seed."""
    model: ModelConfig = field(default_factory=ModelConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    data: DataConfig = field(default_factory=DataConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        spec_of(self.backend)  # refuses one that is not in the table
        if self.adapter.kind == "probe" and self.model.head is None:
            object.__setattr__(self, "model", replace(self.model, head="linear"))

    @property
    def sampling_seed(self) -> int:
        """Return the seed of what is sampled for validation, test and folds."""
        return self.seed if self.data.sample_seed is None else self.data.sample_seed

    @property
    def can_quantize(self) -> bool:
        """Return whether the backend can keep frozen linears quantized."""
        return spec_of(self.backend).quantizes and self.parallel.tp == 1


def require(condition: bool, message: str) -> None:
    """Raise ConfigError with `message` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)
