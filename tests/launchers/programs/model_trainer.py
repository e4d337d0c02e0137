"""Start jobs by version 3 of SageMaker's SDK on the AWS that AWS_ENDPOINT_URL names; print the requests that left.

Needs launchers/sagemaker/requirements.txt and sagemaker-train: python model_trainer.py LISTS, where LISTS is a JSON
list of lists of launch.py's flags.
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import launch
import sdk
import service
from botocore.awsrequest import AWSPreparedRequest, AWSResponse


def small(folder: Path, job: Any) -> Path:
    """Sources of one empty file: this package is not installed here."""
    folder.mkdir(parents=True)
    (folder / "entry.py").touch()
    return folder


DENIED = b"<ErrorResponse><Error><Code>AccessDenied</Code><Message>no</Message></Error></ErrorResponse>"


class Body(io.BytesIO):
    """The body of a response that botocore reads."""

    def stream(self, **_: Any) -> Any:
        yield self.read()


def denied(request: AWSPreparedRequest, **_: Any) -> AWSResponse:
    """Refuse what the SDK asks IAM of the role: launcher-policy.json does not allow it, and moto does not know it."""
    return AWSResponse(request.url, 403, {}, Body(DENIED))


sent: list[dict[str, Any]] = []
really = service.session


def session(region: str | None) -> Any:
    """Return a session that tells what leaves."""
    boto = really(region)
    event = "provide-client-params.sagemaker.CreateTrainingJob"
    boto.events.register(event, lambda params, **_: sent.append(dict(params)))
    boto.events.register("before-send.iam", denied)
    return boto


service.stage, service.session = small, session
for words in json.loads(sys.argv[1]):
    sdk.model_trainer(launch.parse(words)[0]).train(wait=False, logs=False)
print("REQUESTS " + json.dumps(sent))
