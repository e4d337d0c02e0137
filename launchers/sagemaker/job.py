"""Describe a SageMaker training job and check it before anything is sent: the service refuses most errors late."""

from __future__ import annotations

import json
import os
import re
import time
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import yaml
from channels import shape_in, source_in

from esm_neuron.backends.neuron_env import apply_settings
from esm_neuron.backends.topology import Topology, legal_tp
from esm_neuron.config import TrainConfig, require, settings
from esm_neuron.config.rules import accumulated_passes, validate
from esm_neuron.data.filters import SPLITS
from esm_neuron.data.records import is_hub, is_remote
from esm_neuron.errors import ConfigError
from esm_neuron.models.shapes import SHAPES, EsmShape, check_layers
from esm_neuron.planning.instances import Instance, read_prices

IMAGES = Path(__file__).with_name("images.yaml")
DAYS = 24 * 3600
MOST_RUN = 28 * DAYS
"""Longest run of a job that the service allows, in seconds."""
MOST_WARM = 21_600
"""Longest life of a warm pool that the service allows, in seconds."""
STAGED = "run.yaml"
"""Name of the config in the source archive, whatever it is called here."""
PLAIN = re.compile(r"[\w./:@%+=,-]+")
"""Values that reach the entry point as they are. The toolkit of the pinned image (sagemaker-training 5.1.1) joins the
words of its command with spaces and gives them to a shell; all other values are written into the staged config."""
OWN = ("config", "output", "backend", "checkpoint.resume", "data.train", "data.valid", "data.test")
"""Settings that only the launcher and the entry point give."""
BACKENDS = {"neuron": "neuron", "gpu": "cuda"}
"""Kind of an instance -> the backend that runs on it."""

TOOLKIT_HYPERPARAMETERS = 7
"""Hyperparameters that `request.py` adds for the container's toolkit; the service counts them too."""

_NUMBER = r"(-?[0-9.]+(?:e[+-]?[0-9]+)?)"
TRAIN_METRICS = (
    "loss", "lr", "grad_norm", "epoch", "sequences_per_second", "residues_per_second", "graphs", "peak_memory_gb",
)  # fmt: skip
EVAL_METRICS = (
    "loss", "accuracy", "subset_accuracy", "balanced_accuracy", "mcc", "macro_f1", "micro_f1", "auroc", "auprc",
    "perplexity", "spearman", "pearson", "rmse", "mae", "r2",
)  # fmt: skip


def metric_definitions() -> list[dict[str, str]]:
    """Return name and pattern of the metrics that SageMaker reads from the lines of `callbacks.ProgressConsole`."""
    train = {f"train:{name}": rf"step=\d+/\d+ (?:.* )?{name}={_NUMBER}(?: |$)" for name in TRAIN_METRICS}
    valid = {f"valid:{name}": rf"eval step=\d+ split=valid (?:.* )?{name}={_NUMBER}(?: |$)" for name in EVAL_METRICS}
    return [{"Name": name, "Regex": regex} for name, regex in {**train, **valid}.items()]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training job. Folders and files may be local (they are uploaded) or s3:// URIs."""

    config: Path
    """YAML of the training run, as for `esm-neuron train`."""
    instance_type: str
    """For example ml.trn1.32xlarge, ml.trn1n.32xlarge, ml.g5.2xlarge."""
    output: str
    """s3:// prefix for code, uploads, checkpoints and results; the job's name is added."""
    role: str
    """ARN of the execution role."""
    region: str
    """For example us-west-2."""
    name: str = field(default_factory=lambda: time.strftime("esm-neuron-%Y%m%d-%H%M%S", time.gmtime()))
    """Name of the job, unique in account and region. To go on with an earlier job, see `checkpoints`."""
    instance_count: int = 1
    """Instances; several need ml.trn1.32xlarge, ml.trn1n.32xlarge or GPU instances (small ones by plain TCP)."""
    train: str | None = None
    """Training file, or an s3:// prefix that holds it. None: the file of the config is uploaded."""
    valid: str | None = None
    """Validation file, as `train`."""
    test: str | None = None
    """Test file, as `train`."""
    model: str | None = None
    """Hugging Face folder of the pretrained weights, local or s3://. None: from the hub, by the config's name."""
    input_mode: Literal["File", "FastFile"] = "File"
    """File: data and weights are copied before the start. FastFile: they are read from S3 as they are asked for."""
    checkpoints: str | None = None
    """s3:// prefix of the checkpoints; give that of an earlier job to resume it. None: under `output` and `name`."""
    compile_cache: str | None = None
    """s3:// prefix that keeps compiled graphs (NEURON_COMPILE_CACHE_URL)."""
    compile_only: bool = False
    """Compile the graphs of the run into `compile_cache` and end."""
    spot: bool = False
    """Use spare capacity: cheaper, may be interrupted; resumes from the newest checkpoint."""
    max_run: int = DAYS
    """Seconds after which the service stops the job."""
    max_dollars: float | None = None
    """Refuse a job that could cost more: instances x `max_run` x price on demand."""
    prices: Path | None = None
    """Price list, as for `esm-neuron plan`: other prices, or more instances. None: the one of this package."""
    retries: int = 3
    """How often the service starts the job again after an error of its own."""
    max_wait: int | None = None
    """Spot: longest time of waiting and running together, in seconds. None: as `max_run`."""
    keep_alive: int = 0
    """Seconds that the instances stay for the next job (warm pool), at the full price."""
    image: str | None = None
    """Full name of the training image. None: the one in images.yaml for the instance and region."""
    baked: bool = False
    """`image` holds this package and its requirements (launchers/Dockerfile), so nothing is installed at start."""
    network_isolation: bool = False
    """No network in the container; needs `baked`, and weights in `model`."""
    subnets: tuple[str, ...] = ()
    """VPC subnets."""
    security_groups: tuple[str, ...] = ()
    """VPC security groups."""
    volume_kms_key: str | None = None
    """Key for the EBS volume. Refused where there is local NVMe, which is always encrypted and takes no key."""
    output_kms_key: str | None = None
    """Key for results in S3."""
    encrypt_traffic: bool = False
    """Encrypt traffic between instances."""
    volume_gb: int = 200
    """Size of the EBS volume in GB; instances with local NVMe use that."""
    tags: dict[str, str] = field(default_factory=dict)
    """Tags of the job."""
    environment: dict[str, str] = field(default_factory=dict)
    """More environment variables."""
    overrides: tuple[str, ...] = ()
    """Flags of `esm-neuron train` besides the config: the words after `--`."""

    def __post_init__(self) -> None:
        """Check everything; raises ConfigError with the cure."""
        self._check_service()
        self._check_network()
        self._check_limits()
        self._check_run()
        require(bool(self.image_uri), "image: empty; leave it out or name one")

    @property
    def instance(self) -> Instance:
        """Return the description of the instance."""
        known = read_prices(self.prices).instances
        plain = self.instance_type.removeprefix("ml.")
        if not self.instance_type.startswith("ml.") or plain not in known:
            names = ", ".join(f"ml.{name}" for name in known)
            cure = f"it has {names}; give --prices FILE with more"
            raise ConfigError(f"instance_type={self.instance_type} is not in the price list; {cure}")
        return known[plain]

    @property
    def most_dollars(self) -> float | None:
        """Return what the job costs if it runs until `max_run` on demand and its warm pool until `keep_alive`; None if
        the price is not known."""
        price = self.instance.prices.get("sagemaker")
        return None if price is None else self.instance_count * (self.max_run + self.keep_alive) / 3600 * price

    @cached_property
    def run(self) -> TrainConfig:
        """Return the configuration of the training run, overrides included."""
        words = ["--config", str(self.config), *self.overrides, "--backend", BACKENDS[self.instance.kind]]
        return settings.parse(words)

    @property
    def weights(self) -> str:
        """Return the folder or name of the pretrained model, where that can be looked at here."""
        return self.run.model.name if self.model is None or is_s3(self.model) else self.model

    @cached_property
    def shape(self) -> EsmShape | None:
        """Return the shape of the model, cut off after `model.layers`; None where it is not known here."""
        shape, layers = shape_in(self.weights), self.run.model.layers
        if shape is None or not isinstance(layers, int):
            return shape
        return replace(shape, layers=check_layers(layers, shape.layers, self.weights))

    @cached_property
    def flags(self) -> dict[str, str]:
        """Return name -> value of the overrides."""
        words = [part for word in self.overrides for part in word.split("=", 1)]
        require(len(words) % 2 == 0, f"overrides {' '.join(words)}: give each as --section.field value")
        found: dict[str, str] = {}
        for flag, value in zip(words[::2], words[1::2], strict=True):
            require(flag.startswith("--"), f"override {flag}: no flag; give each as --section.field value")
            name = settings.full_name(flag.removeprefix("--"))
            require(name not in OWN, f"override {flag}: the job sets it; see launch.py --help")
            found[name] = value
        return found

    @property
    def hyperparameters(self) -> dict[str, str]:
        """Return the flags of the entry point: the plain ones (`PLAIN`); the others are in `config_text`."""
        plain = {name: value for name, value in self.flags.items() if PLAIN.fullmatch(value)}
        return {"config": STAGED, "backend": BACKENDS[self.instance.kind], **plain}

    @property
    def config_text(self) -> str:
        """Return the staged config: the file, or all settings where an override cannot be a hyperparameter."""
        written = [word for name, value in self.flags.items() if not PLAIN.fullmatch(value) for word in (name, value)]
        if not written:
            return self.config.read_text(encoding="utf-8")
        words = [f"--{word}" if place % 2 == 0 else word for place, word in enumerate(written)]
        return settings.dump(settings.parse(["--config", str(self.config), *words]))

    @property
    def variables(self) -> dict[str, str]:
        """Return the environment of the container, besides what SageMaker sets."""
        found: dict[str, str] = {}
        if self.instance.kind == "neuron" and self.instance_count > 1:
            # the container's toolkit sets these for trn1.32xlarge, but not for trn1n
            settings_of_library = apply_settings(self.run, nodes=True, env={})
            found |= {name: value for name, value in settings_of_library.items() if name.startswith("FI_")}
        if self.compile_cache:
            found["NEURON_COMPILE_CACHE_URL"] = self.compile_cache
        if self.compile_only:
            found["RUN_NEURON_PARALLEL_COMPILE"] = "1"
        return found | self.environment

    @property
    def image_uri(self) -> str:
        """Return the full name of the image."""
        if self.image:
            return self.image
        known, host = read_images(), registry(self.region)
        regions = known["regions"].get(self.instance.kind, [self.region])
        absent = (
            f"region={self.region} has no {self.instance.kind} image; use one of {', '.join(regions)}, or give --image"
        )
        require(self.region in regions, absent)
        gone = known["gone"].get(self.instance.device)
        require(gone is None, f"instance_type={self.instance_type}: {gone}; give --image, or another instance")
        return f"{host}/{known[self.instance.kind]}"

    @property
    def prefix(self) -> str:
        """Return the s3:// prefix of everything that belongs to this job."""
        return f"{self.output.rstrip('/')}/{self.name}"

    @property
    def checkpoint_uri(self) -> str:
        """Return the s3:// prefix of the checkpoints. Without its slash, that of run1 would restore run10's too."""
        return f"{(self.checkpoints or f'{self.prefix}/checkpoints').rstrip('/')}/"

    @property
    def inputs(self) -> dict[str, str]:
        """Return channel -> local path or s3:// URI; data of the hub and of the web are read in the container."""
        found = {split: getattr(self, split) or getattr(self.run.data, split) for split in SPLITS}
        found["model"] = self.model
        return {name: value for name, value in found.items() if value is not None and not self._is_elsewhere(value)}

    @staticmethod
    def _is_elsewhere(value: str) -> bool:
        return is_hub(value) or (is_remote(value) and not is_s3(value))

    @property
    def channels(self) -> dict[str, str]:
        """Return channel -> s3:// URI that the container gets all of; local inputs are uploaded to theirs."""
        return {
            name: folder(value) if is_s3(value) else f"{self.prefix}/input/{name}/"
            for name, value in self.inputs.items()
        }

    @property
    def code_uri(self) -> str:
        """Return the s3:// URI of the source archive."""
        return f"{self.prefix}/source/sourcedir.tar.gz"

    def _check_service(self) -> None:
        instance, kind = self.instance, self.instance_type
        named = re.fullmatch(r"[a-zA-Z0-9](-*[a-zA-Z0-9]){0,62}", self.name)
        check = require
        check(named is not None, f"name={self.name}: 1 to 63 letters, digits and hyphens, no hyphen at the ends")
        role = re.fullmatch(r"arn:aws[a-z-]*:iam::\d{12}:role/.+", self.role)
        check(role is not None, f"role={self.role} is no role ARN; it looks like arn:aws:iam::123456789012:role/NAME")
        check(self.instance_count >= 1, f"instance_count={self.instance_count} must be at least 1")
        alone = f"instance_count={self.instance_count}: {kind} has no network for it; use 1, or a larger instance"
        check(self.instance_count == 1 or instance.network is not None, alone)
        check(1 <= self.max_run <= MOST_RUN, f"max_run={self.max_run} is outside 1 to {MOST_RUN} seconds (28 days)")
        check(self.spot or self.max_wait is None, f"max_wait={self.max_wait} is for spot jobs; add --spot true")
        short = f"max_wait={self.max_wait} is below max_run={self.max_run}; it holds waiting and running together"
        check(self.max_wait is None or self.max_wait >= self.max_run, short)
        warm = f"keep_alive={self.keep_alive}"
        check(0 <= self.keep_alive <= MOST_WARM, f"{warm} is outside 0 to {MOST_WARM} seconds")
        check(not (self.spot and self.keep_alive), f"{warm}: spot instances have no warm pool; use one of the two")
        if instance.disk is not None:
            local = f"volume_kms_key: {kind} has local NVMe, which encrypts by itself and takes no key; leave it out"
            check(self.volume_kms_key is None, local)
            held = f"volume_gb={self.volume_gb}: {kind} has {instance.disk:g} GB of local NVMe, and no other disk"
            check(self.volume_gb <= instance.disk, held)
        check(1 <= self.volume_gb <= 16_384, f"volume_gb={self.volume_gb} is outside 1 to 16384")
        check(1 <= self.retries <= 30, f"retries={self.retries} is outside 1 to 30")
        if self.max_dollars is not None:
            most = self.most_dollars
            unknown = f"max_dollars={self.max_dollars:g}: the price of {kind} is not known; give it by --prices FILE"
            check(most is not None, unknown)
            hours = f"{self.instance_count} x {kind} for {(self.max_run + self.keep_alive) / 3600:g} h"
            over = f"max_dollars={self.max_dollars:g} is below {most or 0:.2f}, the price of {hours}; lower --max-run"
            check((most or 0) <= self.max_dollars, over)
        if self.compile_only:
            check(instance.kind == "neuron", f"compile_only: only Trainium compiles ahead; train on {kind} at once")
            lost = "compile_only: its graphs would be lost; add --compile-cache s3://bucket/prefix"
            check(self.compile_cache is not None, lost)
        for name in ("output", "checkpoints", "compile_cache"):
            value = getattr(self, name)
            check(value is None or is_s3(value), f"{name}={value} is no S3 URI; it looks like s3://bucket/prefix")

    def _check_network(self) -> None:
        check = require
        check(bool(self.subnets) == bool(self.security_groups), "a VPC needs both: --subnets and --security-groups")
        many = f"{len(self.subnets)} subnets, {len(self.security_groups)} security groups; the service takes 16 and 5"
        check(len(self.subnets) <= 16 and len(self.security_groups) <= 5, many)
        check(not self.baked or self.image is not None, "baked=true needs --image, the image with this package in it")
        if self.network_isolation:
            cut = "network_isolation=true:"
            check(
                self.baked, f"{cut} nothing can be installed; bake launchers/Dockerfile, add --image and --baked true"
            )
            check(self.compile_cache is None, f"{cut} S3 cannot be reached; leave compile_cache out")
            away = [split for split in SPLITS if self._is_elsewhere(getattr(self.run.data, split) or "")]
            check(not away, f"{cut} data.{'/'.join(away)} cannot be fetched; give files or s3:// URIs")
            weights = f"{cut} the hub cannot be reached; give the weights of {self.run.model.name}: --model FOLDER"
            check(self.run.model.init == "random" or self.model is not None, weights)

    def _check_limits(self) -> None:
        encoded = {name: json.dumps(text) for name, text in self.hyperparameters.items()}  # as they are sent
        limits = (
            ("hyperparameters", encoded, TOOLKIT_HYPERPARAMETERS, 100, 256, 2500),
            ("environment", self.variables, 0, 100, 512, 512),
            ("tags", self.tags, 0, 50, 128, 256),
        )
        for what, values, added, most, key, value in limits:
            count = f"{len(values) + added} of them" + (f", {added} for the container's toolkit" if added else "")
            require(len(values) + added <= most, f"{what}: {count}; the service takes {most}")
            for name, text in values.items():
                require(1 <= len(name) <= key, f"{what}: {name[:40]}... has {len(name)} characters; at most {key}")
                require(len(text) <= value, f"{what}: the value of {name} has {len(text)} characters; at most {value}")
        reserved = [name for name in self.tags if name.lower().startswith("aws:")]
        require(not reserved, f"tags: {', '.join(reserved)}: aws: is the service's own; choose another name")

    def _check_run(self) -> None:
        data = {split: getattr(self, split) or getattr(self.run.data, split) for split in SPLITS}
        given = (
            f"train: no training file; give --train FILE or --train s3://bucket/prefix, or data.train in {self.config}"
        )
        require(data["train"] is not None, given)
        cfg, instance = replace(self.run, data=replace(self.run.data, **data)), self.instance
        validate(cfg)
        topology = Topology(world=instance.devices * self.instance_count, tp=cfg.parallel.tp)
        if self.model is not None:
            unread = f"model={self.model}: with model.init=random no weights are read; leave --model out"
            require(cfg.model.init == "pretrained", unread)
            pinned = f"model.revision={cfg.model.revision} is of a hub id, not of --model; pin it by model.sha256"
            require(cfg.model.revision is None, pinned)
        lost = f"model.name={cfg.model.name} is a folder of this machine; give it by --model {cfg.model.name}"
        there = self.model is not None or cfg.model.name in SHAPES or not os.path.isdir(cfg.model.name)
        require(there, lost)
        if self.shape is not None:
            legal = legal_tp(self.shape.heads, self.shape.intermediate, cfg.parallel.pad_heads)
            cure = f"does not cut {self.weights}; use {', '.join(map(str, legal))}"
            require(cfg.parallel.tp in legal, f"parallel.tp={cfg.parallel.tp} {cure}")
        if instance.kind == "neuron":
            topology.validate_neuron(instance.devices, instance.devices)
        instance.check_precision(cfg)
        accumulated_passes(cfg, topology.dp)
        for name, value in self.inputs.items():
            there = is_s3(value) or os.path.exists(value)
            require(there, f"{name}={value}: no such file or folder; give a local path or s3://bucket/prefix")
            if name in SPLITS and os.path.isdir(value):
                source_in(name, Path(value), getattr(self.run.data, name))  # as the container will


def read_images() -> dict[str, Any]:
    """Return AWS's images, and the accounts of its regions."""
    found: dict[str, Any] = yaml.safe_load(IMAGES.read_text(encoding="utf-8"))
    return found


def registry(region: str) -> str:
    """Return the host that serves AWS's images in a region. Raise ConfigError where it is not known."""
    known = read_images()
    require(region in known["accounts"], f"region={region} is not in {IMAGES.name}; give --image")
    domain = known.get("domains", {}).get(region, "amazonaws.com")
    return f"{known['accounts'][region]}.dkr.ecr.{region}.{domain}"


def is_s3(text: str) -> bool:
    """Return whether `text` is the URI of a bucket or of something in it."""
    return re.fullmatch(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/.*)?", text) is not None


def bucket_and_key(uri: str) -> tuple[str, str]:
    """Return the bucket of an s3:// URI, and what is behind it."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


def folder(uri: str) -> str:
    """Return the URI of a folder with its slash, so that no other prefix begins like it; one of a file as it is."""
    return uri if uri.endswith("/") or "." in uri.rpartition("/")[2] else f"{uri}/"
