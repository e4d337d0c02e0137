"""Answer requests on SageMaker with an archive of hosting.py, as it comes, from a queue, or for a whole file:

    python launchers/sagemaker/deploy.py real-time --archive s3://bucket/model.tar.gz --role ARN --region us-west-2 \\
        --instance-type ml.c7i.2xlarge [--dry-run]
    python launchers/sagemaker/deploy.py asynchronous --output s3://bucket/answers ...
    python launchers/sagemaker/deploy.py batch --input s3://bucket/proteins.csv --output s3://bucket/answers ...

`real-time` and `asynchronous` make a model, a configuration and an endpoint, which costs money until it is deleted.
`batch` makes a model and a transform job, which ends by itself: its input is CSV without a header, or JSON lines, cut
by line; its answers are JSON lines. `--dry-run` prints the requests and sends nothing: it needs no account and no SDK.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import service
from job import is_s3, read_images, registry

from esm_neuron.cli import log
from esm_neuron.config import require
from esm_neuron.config.flags import CommandParser
from esm_neuron.errors import EsmNeuronError
from esm_neuron.redact import redact, shown

KINDS = ("real-time", "asynchronous", "batch")
CONTENT = {".csv": "text/csv", ".jsonl": "application/jsonlines"}
"""Suffix of a batch's input -> content type of its lines."""
LINES = "application/jsonlines"
MEGABYTES = 6
"""Of a request of a batch, the service's own default; one is answered within a minute on a CPU."""
SHARED = 4
"""Requests that an asynchronous instance takes at once."""

Request = tuple[str, dict[str, Any]]
"""A method of boto3's client, and its arguments."""


def requests(args: argparse.Namespace) -> list[Request]:
    """Return what is asked for, in order. Raise ConfigError where the service would refuse it later."""
    name, kind = args.name, args.kind
    places = {"archive": args.archive, "output": args.output, "input": args.input}
    needed = {"real-time": {"archive"}, "asynchronous": {"archive", "output"}, "batch": set(places)}[kind]
    for place, uri in places.items():
        require((uri is not None) == (place in needed), f"--{place}: {kind} needs {', '.join(sorted(needed))}")
        require(uri is None or is_s3(uri), f"--{place} {uri}: must be an s3:// URI; upload it first")
    require(1 <= args.instance_count <= 100, f"--instance-count {args.instance_count} is outside 1 to 100")
    require(len(name) <= 63, f"--name {name} has {len(name)} characters; the service takes at most 63")
    image = args.image or f"{registry(args.region)}/{read_images()['inference'][args.backend]}"
    program = {"SAGEMAKER_PROGRAM": "inference.py", "SAGEMAKER_SUBMIT_DIRECTORY": "/opt/ml/model/code"}
    container = {"Image": image, "ModelDataUrl": args.archive, "Environment": program}
    model = {"ModelName": name, "ExecutionRoleArn": args.role, "PrimaryContainer": container}
    return [("create_model", model), *(_batch(args) if kind == "batch" else _endpoint(args))]


def _endpoint(args: argparse.Namespace) -> list[Request]:
    variant = {
        "VariantName": "all", "ModelName": args.name, "InitialInstanceCount": args.instance_count,
        "InstanceType": args.instance_type,
    }  # fmt: skip
    config: dict[str, Any] = {"EndpointConfigName": args.name, "ProductionVariants": [variant]}
    if args.kind == "asynchronous":
        out = args.output.rstrip("/")
        config["AsyncInferenceConfig"] = {
            "OutputConfig": {"S3OutputPath": f"{out}/answers", "S3FailurePath": f"{out}/failures"},
            "ClientConfig": {"MaxConcurrentInvocationsPerInstance": SHARED},
        }
    endpoint = {"EndpointName": args.name, "EndpointConfigName": args.name}
    return [("create_endpoint_config", config), ("create_endpoint", endpoint)]


def _batch(args: argparse.Namespace) -> list[Request]:
    suffix = next((suffix for suffix in CONTENT if args.input.endswith(suffix)), None)
    require(suffix is not None, f"--input {args.input}: a batch is cut by line; give {' or '.join(CONTENT)}")
    source = {"S3DataSource": {"S3DataType": "S3Prefix", "S3Uri": args.input}}
    transform = {
        "TransformJobName": args.name,
        "ModelName": args.name,
        "BatchStrategy": "MultiRecord",
        "MaxPayloadInMB": MEGABYTES,
        "TransformInput": {"DataSource": source, "ContentType": CONTENT[str(suffix)], "SplitType": "Line"},
        "TransformOutput": {"S3OutputPath": args.output.rstrip("/"), "Accept": LINES, "AssembleWith": "Line"},
        "TransformResources": {"InstanceType": args.instance_type, "InstanceCount": args.instance_count},
    }
    return [("create_transform_job", transform)]


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return what the words say. Raise ConfigError for a flag that is not known."""
    parser = CommandParser(
        prog="deploy.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--archive", help="s3:// URI of the model.tar.gz of hosting.py")
    parser.add_argument("--role", required=True, help="ARN of the execution role")
    parser.add_argument("--region", required=True, help="for example us-west-2")
    parser.add_argument("--instance-type", required=True, help="for example ml.c7i.2xlarge, ml.g5.xlarge")
    parser.add_argument("--instance-count", type=int, default=1, help="instances (default: %(default)s)")
    parser.add_argument("--backend", choices=("cpu", "cuda"), default="cpu", help="as given to hosting.py")
    parser.add_argument("--input", help="s3:// URI of a batch's .csv or .jsonl")
    parser.add_argument("--output", help="s3:// prefix for answers")
    parser.add_argument("--image", help="another inference image")
    name = time.strftime("esm-neuron-%Y%m%d-%H%M%S", time.gmtime())
    parser.add_argument("--name", default=name, help="of model, endpoint or job (default: by the time)")
    parser.add_argument("--dry-run", action="store_true", help="print the requests, send nothing")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """Send the requests, or print them; return the exit code."""
    try:
        args = parse(argv)
        found = requests(args)
        if args.dry_run:
            print(redact(json.dumps(dict(found), indent=2)))
            return 0
        client = service.session(args.region).client("sagemaker")
        for method, words in found:
            with service.asked(f"{method} {args.name} in {args.region}"):
                getattr(client, method)(**words)
        if args.kind != "batch":
            ends = f"aws sagemaker delete-endpoint --endpoint-name {args.name} --region {args.region}"
            log(f"it costs money until: {ends}")
        log(f"{args.kind} {args.name} was asked for")
    except EsmNeuronError as error:
        sys.stderr.write(shown(f"deploy.py: error: {error}") + "\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
