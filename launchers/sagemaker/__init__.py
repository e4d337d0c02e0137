"""Jobs on SageMaker from a notebook: `from launchers.sagemaker import Job, estimator, inputs` beside launchers/.

The modules of this folder are programs as well (`python launchers/sagemaker/launch.py`), so they name each other as
neighbours; for that, the folder has to be on Python's path.
"""

from __future__ import annotations

import sys
from pathlib import Path

if str(Path(__file__).parent) not in sys.path:
    sys.path.append(str(Path(__file__).parent))

from job import Job
from request import create_training_job
from sdk import estimator, inputs, model_trainer

__all__ = ["Job", "create_training_job", "estimator", "inputs", "model_trainer"]
