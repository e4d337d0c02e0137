"""A job's description: what the service refuses late is refused here, and what it gets is what was meant."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import launch
import money
import pytest
import stage
import yaml
from job import BACKENDS, TOOLKIT_HYPERPARAMETERS, Job, metric_definitions

import esm_neuron
from esm_neuron.backends.neuron_env import SETTINGS
from esm_neuron.config import TrainConfig, settings
from esm_neuron.errors import ConfigError
from esm_neuron.planning.instances import read_prices
from esm_neuron.training import run
from esm_neuron.training.callbacks import format_record

Described = Callable[..., dict[str, Any]]
Toy = Callable[..., TrainConfig]
ROOT = Path(__file__).parents[2]
VPC = {"subnets": ("subnet-1",), "security_groups": ("sg-1",)}
BAKED = {"image": "123456789012.dkr.ecr.us-west-2.amazonaws.com/esm:1", "baked": True}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "a" * 64}, "1 to 63 letters, digits and hyphens"),
        ({"name": "under_score"}, "name=under_score: 1 to 63 letters, digits and hyphens"),
        ({"role": "trainer"}, "role=trainer is no role ARN; it looks like arn:aws:iam::123456789012:role/NAME"),
        (
            {"instance_type": "trn1.32xlarge"},
            "instance_type=trn1.32xlarge is not in the price list; it has ml.trn1.2xl",
        ),
        ({"instance_count": 0}, "instance_count=0 must be at least 1"),
        ({"instance_type": "ml.trn1.2xlarge", "instance_count": 2}, "ml.trn1.2xlarge has no network for it; use 1"),
        ({"max_run": 2_419_201}, "max_run=2419201 is outside 1 to 2419200 seconds"),
        ({"max_wait": 90_000}, "max_wait=90000 is for spot jobs; add --spot true"),
        ({"spot": True, "max_run": 7200, "max_wait": 3600}, "max_wait=3600 is below max_run=7200"),
        ({"spot": True, "keep_alive": 600}, "keep_alive=600: spot instances have no warm pool; use one of the two"),
        ({"keep_alive": 21_601}, "keep_alive=21601 is outside 0 to 21600 seconds"),
        ({"retries": 0}, "retries=0 is outside 1 to 30"),
        (
            {"max_dollars": 593.0},
            "max_dollars=593 is below 593.52, the price of 1 x ml.trn1.32xlarge for 24 h; lower --max-run",
        ),
        (
            {"max_dollars": 593.0, "instance_type": "ml.trn1n.32xlarge"},
            "the price of ml.trn1n.32xlarge is not known; give it by --prices FILE",
        ),
        ({"volume_kms_key": "key"}, "volume_kms_key: ml.trn1.32xlarge has local NVMe, which encrypts by itself"),
        ({"volume_gb": 0}, "volume_gb=0 is outside 1 to 16384"),
        ({"volume_gb": 7601}, "volume_gb=7601: ml.trn1.32xlarge has 7600 GB of local NVMe, and no other disk"),
        ({"region": "eu-west-2"}, "region=eu-west-2 has no neuron image; use one of ap-northeast-1, "),
        ({"output": "bucket/esm"}, "output=bucket/esm is no S3 URI; it looks like s3://bucket/prefix"),
        ({"checkpoints": "s3://"}, "checkpoints=s3:// is no S3 URI"),
        ({"compile_cache": "/var/cache"}, "compile_cache=/var/cache is no S3 URI"),
        ({"subnets": ("subnet-1",)}, "a VPC needs both: --subnets and --security-groups"),
        ({**VPC, "security_groups": ("sg",) * 6}, "1 subnets, 6 security groups; the service takes 16 and 5"),
        ({"baked": True}, "baked=true needs --image"),
        ({"network_isolation": True}, "nothing can be installed; bake launchers/Dockerfile"),
        ({"network_isolation": True, **BAKED}, "give the weights of facebook/esm2_t33_650M_UR50D: --model FOLDER"),
        ({"network_isolation": True, **BAKED, "compile_cache": "s3://bucket/c"}, "S3 cannot be reached"),
        ({"tags": {f"t{n}": "" for n in range(51)}}, "tags: 51 of them; the service takes 50"),
        ({"tags": {"aws:cost": "x"}}, "tags: aws:cost: aws: is the service's own"),
        ({"tags": {"k" * 129: "x"}}, "has 129 characters; at most 128"),
        ({"environment": {"A": "x" * 513}}, "environment: the value of A has 513 characters; at most 512"),
        ({"environment": {f"V{n}": "" for n in range(101)}}, "environment: 101 of them; the service takes 100"),
        ({"overrides": ("--output", "x")}, "override --output: the job sets it"),
        ({"overrides": ("--optim.rate", "1")}, "unknown setting optim.rate"),
        ({"overrides": ("--parallel.tp", "8")}, "parallel.tp=8 does not cut facebook/esm2_t33_650M_UR50D; use 1, 2, 4"),
        ({"overrides": ("--parallel.tp", "3")}, "tp=3 does not divide the world of 32 processes"),
        ({"overrides": ("--loop.packs_per_step", "48")}, "loop.packs_per_step=48 is not a multiple of 32"),
        ({"train": "nowhere.csv"}, "train=nowhere.csv: no such file"),
        ({"config": {"data": {"train": None}}}, "train: no training file; give --train FILE or --train s3://bucket"),
        (
            {"config": {"model": {"init": "random"}}, "model": "s3://bucket/esm2/"},
            "no weights are read; leave --model out",
        ),
        (
            {"model": "s3://bucket/esm2/", "overrides": ("--model.revision", "a" * 40)},
            f"model.revision={'a' * 40} is of a hub id, not of --model; pin it by model.sha256",
        ),
        ({"compile_only": True}, "compile_only: its graphs would be lost; add --compile-cache"),
        ({"overrides": ("--adapter.kind", "qlora")}, "adapter.kind=qlora with backend=neuron"),
        ({"compile_only": True, "instance_type": "ml.g5.2xlarge"}, "only Trainium compiles ahead"),
        (
            {"instance_type": "ml.p3.2xlarge"},
            "ml.p3.2xlarge: the image's CUDA 13 does not support V100, whose last is CUDA 12; give --image",
        ),
        ({"config": {"model": {"name": "/"}}}, "model.name=/ is a folder of this machine; give it by --model /"),
        ({"model": "/"}, "/config.json: cannot be read"),
        ({"region": "mars-1"}, "region=mars-1 is not in images.yaml; give --image"),
    ],
)
def test_what_the_service_would_refuse_late(described: Described, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as refused:
        Job(**described(**changes))
    assert "\n" not in str(refused.value)


def test_the_jobs_own_data_is_what_is_checked(described: Described) -> None:
    """A config without data.train, as those of configs/cuda, is whole with the job's."""
    splits = {"train": "s3://bucket/train/", "valid": "s3://bucket/valid/"}
    job = Job(**described(config={"data": {"train": None, "valid": None, "test": None}}, **splits))
    assert job.run.data.train is None and job.inputs == splits
    with pytest.raises(ConfigError, match="data.test='s3://bucket/.*has a zero byte"):
        Job(**described(config={"data": {"train": None}}, **splits, test="s3://bucket/\0"))


def test_hyperparameters_are_counted_with_those_of_the_sdk(
    described: Described, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[str, str] = {}
    monkeypatch.setattr(Job, "hyperparameters", property(lambda job: found))
    most = 100 - TOOLKIT_HYPERPARAMETERS
    found |= {f"h{n}": "1" for n in range(most)}
    Job(**described())
    found["more"] = "1"
    with pytest.raises(ConfigError, match="hyperparameters: 101 of them, .*; the service takes 100"):
        Job(**described())


def test_hyperparameters_are_measured_as_they_are_sent(described: Described, monkeypatch: pytest.MonkeyPatch) -> None:
    """The SDK sends JSON: quotes around a value, a backslash before each of its own."""
    found = {"note": '"' * 1249}
    monkeypatch.setattr(Job, "hyperparameters", property(lambda job: found))
    Job(**described())
    found["note"] += "x"
    with pytest.raises(ConfigError, match="the value of note has 2501 characters; at most 2500"):
        Job(**described())


def test_hyperparameters_are_flags_of_the_entry_point(described: Described) -> None:
    job = Job(**described(overrides=("--optim.lr", "3e-4", "--parallel.pad_heads=true")))
    assert job.hyperparameters == {
        "config": "run.yaml",
        "backend": "neuron",
        "optim.lr": "3e-4",
        "parallel.pad_heads": "true",
    }
    assert job.config_text == job.config.read_text()


SHELLED = ("--data.label_column", "Subcellular location [CC]", "--data.keep", "{kingdom: [Metazoa, 'Viridi; plantae']}")
"""Values that the pinned container's toolkit gives to a shell unquoted."""


@pytest.mark.parametrize("overrides", [("--loop.epochs", "2.5", "--log.tensorboard", "False"), SHELLED])
def test_the_container_parses_the_run_that_was_described(
    described: Described, overrides: tuple[str, ...], tmp_path: Path
) -> None:
    """Its toolkit joins the words with spaces and hands them to a shell, whose words must be ours."""
    job = Job(**described(overrides=overrides))
    words = [word for name, value in job.hyperparameters.items() if name != "config" for word in (f"--{name}", value)]
    shell = subprocess.run(
        ["sh", "-c", f"printf '%s\\n' {' '.join(words)}"], capture_output=True, text=True, check=True
    )
    assert shell.stdout.splitlines() == words
    staged = tmp_path / "run.yaml"
    staged.write_text(job.config_text)
    assert settings.parse(["--config", str(staged), *words]) == replace(job.run, backend="neuron")
    assert dict(zip(overrides[::2], overrides[1::2], strict=True)).keys() == {f"--{name}" for name in job.flags}


def test_several_nodes_get_the_librarys_network_variables_also_on_trn1n(described: Described) -> None:
    job = Job(**described(instance_type="ml.trn1n.32xlarge", instance_count=4))
    ours = {s.name: s.value(TrainConfig(), True) for s in SETTINGS if s.name.startswith("FI_")}
    assert job.variables == ours and ours["FI_PROVIDER"] == "efa"
    assert Job(**described()).variables == {}


def test_compiling_ahead_is_the_same_job_but_for_its_variables(described: Described) -> None:
    cache = {"compile_cache": "s3://bucket/cache"}
    ahead, training = Job(**described(compile_only=True, **cache)), Job(**described(**cache))
    assert ahead.hyperparameters == training.hyperparameters
    assert training.variables == {"NEURON_COMPILE_CACHE_URL": "s3://bucket/cache"}
    assert ahead.variables == {**training.variables, "RUN_NEURON_PARALLEL_COMPILE": "1"}


def test_images_of_all_regions(described: Described) -> None:
    shipped = yaml.safe_load((ROOT / "launchers" / "sagemaker" / "images.yaml").read_text())
    assert len(shipped["accounts"]) >= 35
    assert all(re.fullmatch(r"\d{12}", account) for account in shipped["accounts"].values())
    china = Job(**described(region="cn-north-1")).image_uri
    assert china == f"727897471807.dkr.ecr.cn-north-1.amazonaws.com.cn/{shipped['neuron']}"
    assert "sdk2.26.1" in shipped["neuron"] and ":2.8.0-" in shipped["neuron"]
    assert set(shipped["regions"]["neuron"]) < set(shipped["accounts"])


def test_metrics_are_read_from_our_own_log_lines(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = toy()
    run.train(cfg, str)
    lines = capsys.readouterr().err.splitlines()
    found: dict[str, list[float]] = {}
    for definition in metric_definitions():
        hits = [re.search(definition["Regex"], line) for line in lines]
        found[definition["Name"]] = [float(hit[1]) for hit in hits if hit]
    always = ("loss", "lr", "grad_norm", "epoch", "sequences_per_second", "residues_per_second")
    for name in always:  # graphs and peak memory: on devices that have them
        assert len(found[f"train:{name}"]) == 8, name
    per_epoch = round(8 / found["train:epoch"][-1])
    assert found["train:epoch"] == [round(step / per_epoch, 2) for step in range(1, 9)]
    ratios = [
        a / b for a, b in zip(found["train:residues_per_second"], found["train:sequences_per_second"], strict=True)
    ]
    train = json.loads((Path(cfg.output) / "result.json").read_text())["data"]["train"]
    assert sum(ratios) / 8 == pytest.approx(train["residues"] / train["records"], rel=0.1), "residues of a sequence"
    evaluated = [line for line in lines if line.startswith("eval ") and "split=valid" in line]
    assert len(evaluated) == 3, "two validations, and what the chosen step reaches, which a tuner takes"
    printed = set(re.findall(r" (\w+)=", evaluated[0])) - {"step", "split", "n", "n_records", "auprc_of"}
    assert printed and all(len(found[f"valid:{name}"]) == 3 for name in printed), printed
    accuracy = float(re.search(r" accuracy=([\d.]+)", evaluated[0])[1])  # type: ignore[index]
    assert found["valid:accuracy"][0] == accuracy, "not balanced_accuracy"


def test_metrics_of_devices_are_read_from_their_lines() -> None:
    record = {"loss": 0.5, "residues_per_second": 1234.0, "graphs": 3, "peak_memory_gb": 19.1}
    line = f"step=4/8 {format_record(record)} eta=00:00:10"
    found = {d["Name"]: re.search(d["Regex"], line) for d in metric_definitions()}
    assert found["train:graphs"][1] == "3" and found["train:peak_memory_gb"][1] == "19.1000"  # type: ignore[index]


def test_a_metric_that_is_no_number_or_negative() -> None:
    regex = {d["Name"]: d["Regex"] for d in metric_definitions()}
    line = "eval step=4 split=valid " + format_record({"mcc": -0.25, "loss": float("nan"), "perplexity": 1e9})
    assert re.search(regex["valid:mcc"], line)[1] == "-0.2500"  # type: ignore[index]
    assert re.search(regex["valid:loss"], line) is None
    assert float(re.search(regex["valid:perplexity"], line)[1]) == 1e9  # type: ignore[index]
    assert re.search(regex["train:loss"], line) is None
    assert len(metric_definitions()) <= 40


def test_the_source_folder_is_clean(described: Described, tmp_path: Path) -> None:
    job = Job(**described())
    folder = stage.stage(tmp_path / "source", job)
    held = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    package = Path(esm_neuron.__file__).parent
    ours = {f"esm_neuron/{path.relative_to(package)}" for path in package.rglob("*") if "__pycache__" not in path.parts}
    assert held == {"entry.py", "channels.py", "run.yaml", "requirements.txt", "constraints.txt"} | {
        name for name in ours if "." in Path(name).name
    }
    assert {"esm_neuron/planning/instances.yaml", "esm_neuron/py.typed"} <= held
    assert not (stage.stage(tmp_path / "baked", replace(job, **BAKED)) / "esm_neuron").exists()


def test_the_image_keeps_its_torch_and_neuron_packages() -> None:
    for kind, extra in (("neuron", "optimum-neuron==0.4.5"), ("gpu", "bitsandbytes")):
        needed, held = stage.requirements(kind)
        names, pinned = ({re.split(r"[^\w-]", line)[0] for line in lines} for lines in (needed, held))
        assert {"transformers", "peft", "jsonargparse"} <= names and any(line.startswith(extra) for line in needed)
        assert (names | pinned).isdisjoint({"torch", "torch-xla", "torch-neuronx", "neuronx-cc", "protobuf"})
        assert names.isdisjoint({"sagemaker", "pytest"})
        assert all("==" in line for line in held) and not any(";" in line for line in needed)
    assert "boto3" not in {line.partition("==")[0] for line in stage.requirements("neuron")[1]}, "the image's stays"


def test_the_words_of_the_command(described: Described) -> None:
    values = described()
    words = ["--config", str(values["config"]), "--instance-type", "ml.trn1.32xlarge", "--role", values["role"]]
    words += ["--region=us-west-2", "--output", "s3://bucket/esm", "--spot", "true", "--dry-run", "--tags.team", "x"]
    job, how = launch.parse([*words, "--", "--optim.lr", "3e-4"])
    assert job.spot and how.dry_run and not how.wait
    assert job.overrides == ("--optim.lr", "3e-4") and job.run.optim.lr == 3e-4
    assert re.fullmatch(r"esm-neuron-\d{8}-\d{6}", job.name)
    with pytest.raises(ConfigError, match="spots"):
        launch.parse([*words, "--spots", "1"])


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("localization_*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_fit_their_instances(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each config names in its first line the instances it is for: `# ml.trn1.32xlarge x 1, 2, 4: ...`."""
    monkeypatch.chdir(ROOT)
    head = re.match(r"# (ml\.\S+) x ([\d, ]+): ", path.read_text())
    assert head is not None
    cfg = settings.read_config(path)
    assert cfg.backend == BACKENDS[read_prices().instances[head[1].removeprefix("ml.")].kind]
    for count in map(int, head[2].split(",")):
        values = {"config": path, "instance_type": head[1], "instance_count": count, "name": "job"}
        where = {"output": "s3://bucket/esm", "role": "arn:aws:iam::123456789012:role/r", "region": "us-east-1"}
        assert Job(**values, **where).run == replace(cfg)


def test_the_15b_fits_with_padded_heads_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """As its config says of less memory a core: 40 heads over 32 cores."""
    monkeypatch.chdir(ROOT)
    values = {"config": Path("configs/localization_15b_trn1.yaml"), "instance_type": "ml.trn1.32xlarge", "name": "job"}
    where = {"output": "s3://bucket/esm", "role": "arn:aws:iam::123456789012:role/r", "region": "us-east-1"}
    padded = ("--parallel.tp", "32", "--parallel.pad_heads", "true")
    assert [Job(**values, **where, overrides=padded, instance_count=n).run.parallel.tp for n in (1, 2, 4)] == [32] * 3
    with pytest.raises(ConfigError, match="parallel.tp=32 does not cut facebook/esm2_t48_15B_UR50D"):
        Job(**values, **where, overrides=padded[:2])


def test_the_cost_is_said_at_most_by_an_estimate_and_where_it_is_least(described: Described) -> None:
    config = {"model": {"name": "facebook/esm2_t33_650M_UR50D", "init": "pretrained"}, "data": {"pack_tokens": 1024}}
    config["loop"] = {"packs_per_step": 128, "packs_per_device": 1, "precision": "bf16", "max_steps": 200}
    most, estimate, cheapest = money.lines(Job(**described(config, spot=True, max_run=7200)))
    assert most.startswith(
        "cost: at most 49.46 dollars on demand, spot about 19.78: 1 x ml.trn1.32xlarge x 2 h (--max-run)"
    )
    found = re.search(
        r": 200 steps of full packs, ([\d.]+) dollars for ([\d.]+) h and ([\d.]+) h of compiling", estimate
    )
    assert found and float(found[1]) == pytest.approx((float(found[2]) + float(found[3])) * 24.73, rel=0.05)
    there = re.fullmatch(r"cheapest that fits: ml\.(\S+), ([\d.]+) dollars for ([\d.]+) h", cheapest)
    assert there and float(there[2]) < float(found[1])
    price = read_prices().instances[there[1]].prices["sagemaker"]
    assert price is not None and float(there[2]) == pytest.approx(price * float(there[3]), rel=0.1)
    unknown = money.lines(Job(**described(config, instance_type="ml.trn1n.32xlarge")))
    assert unknown == ["cost: the price of ml.trn1n.32xlarge is not known; give it by --prices FILE"]
    few = {**config, "loop": {**config["loop"], "packs_per_device": 64}}
    over = money.lines(Job(**described(few, instance_type="ml.g5.xlarge")))
    assert re.match(r"estimate: it may not fit: a device needs [\d.]+ of 22 GiB", over[1])


def test_a_warm_pool_is_part_of_the_most(described: Described) -> None:
    job = Job(**described(max_run=3600, keep_alive=1800, max_dollars=38))
    assert job.most_dollars == pytest.approx(24.73 * 1.5)
    assert "37.09 dollars on demand: 1 x ml.trn1.32xlarge x 1.5 h (--max-run and --keep-alive)" in money.most(job)
    with pytest.raises(ConfigError, match="max_dollars=37 is below 37.09, the price of 1 x ml.trn1.32xlarge for 1.5 h"):
        replace(job, max_dollars=37)


def test_a_model_that_is_cut_off_is_cheaper(described: Described) -> None:
    """By the share of its layers, where the products take the time; a folder is estimated as its name is."""
    values = described({"model": {"name": "facebook/esm2_t33_650M_UR50D", "init": "pretrained"}})
    hours = []
    for layers in ("all", "11"):
        (said, *_) = money.estimated(Job(**values, overrides=("--model.layers", layers, "--loop.max_steps", "100000")))
        hours.append(float(re.search(r"dollars for ([\d.]+) h", said)[1]))  # type: ignore[index]
    assert 2 < hours[0] / hours[1] < 4


def test_a_folder_is_as_its_config_says(described: Described, tmp_path: Path) -> None:
    named = {"num_hidden_layers": 33, "hidden_size": 1280, "num_attention_heads": 20, "intermediate_size": 5120}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "esm", **named}))
    values = described()
    folder = Job(**values, model=str(tmp_path))
    assert money.lines(folder) == money.lines(Job(**values)) and len(money.lines(folder)) > 1
    with pytest.raises(ConfigError, match=f"parallel.tp=8 does not cut {tmp_path}; use 1, 2, 4"):
        replace(folder, overrides=("--parallel.tp", "8"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", **named}))
    with pytest.raises(ConfigError, match="config.json: .*'bert'.*; give the Hugging Face folder of an ESM-2"):
        replace(folder)
