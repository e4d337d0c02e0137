"""Upload an exported folder to the Hugging Face hub, by the hub's own client."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from shlex import quote

from esm_neuron.config import require
from esm_neuron.errors import ConfigError, first_line


def check(repo: str) -> None:
    """Raise ConfigError where an upload to `repo` cannot begin: no such name can be, no token, or offline."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    named = f"--push-to-hub {repo}"
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(f"{named}: {first_line(error)}; name it OWNER/NAME") from error
    require(repo.count("/") == 1, f"{named}: name it OWNER/NAME")
    require(not constants.HF_HUB_OFFLINE, f"{named}: HF_HUB_OFFLINE is set; unset it")
    require(get_token() is not None, f"{named}: no token of the hub here; run: hf auth login, or set HF_TOKEN")


def push(folder: Path, repo: str, public: bool, log: Callable[[str], None]) -> None:
    """Upload all files of `folder`, which is complete and stays; a new `repo` is private unless `public`.

    Raise ConfigError where the hub refuses or does not answer, or where `repo` is there and not as `public` says.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    api, kind = HfApi(), "public" if public else "private"
    where = "" if public else " and, if the repository is new or private"  # to a public one it would upload too
    again = f"the folder is complete{where}: hf upload {repo} {quote(str(folder))} .{'' if public else ' --private'}"
    sizes = [f"{path.name} {path.stat().st_size / 1e6:,.1f} MB" for path in sorted(folder.iterdir())]
    log(f"uploading to {api.endpoint}/{repo} ({kind}): {', '.join(sizes)}")
    try:
        api.create_repo(repo, private=not public, exist_ok=True)
        private = api.model_info(repo).private
        as_asked = private is not public
        message = "esm-neuron export"
        url = api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message) if as_asked else None
    except Exception as error:  # what it raises differs between its versions, and so does what is under it
        raise ConfigError(f"--push-to-hub {repo} failed ({first_line(error)}); {again}") from error
    there, cure = ("private", "leave out --public") if public else ("public", "give --public")
    require(url is not None, f"--push-to-hub {repo}: it is there and {there}; {cure}, or name another")
    log(f"uploaded: {url}")
