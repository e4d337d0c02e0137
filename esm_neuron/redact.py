"""What is shown to a person, or kept in a log: without secrets, one line where it is one, and not without end.

Text of others (ids, labels, columns, names of files and tensors, messages of libraries) can hold control characters,
line breaks and marks of direction: in a terminal these hide or forge what stands there. So each printed line goes
through `shown`, and a text of several lines is put together by `Lines.of`.

Secrets are known by their form: credentials and signatures in URLs, headers of authorization, private keys, and the
tokens of the Hugging Face hub, GitHub, GitLab, Slack, OpenAI, PyPI, Google and AWS; also what follows the exact name
of a variable that holds one, such as `HF_TOKEN=`. No word is guessed to be one: classes of proteins have such names.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable

HIDDEN = "***"
"""Written in place of a secret."""
MOST = 4_000
"""Most characters of a line that are shown: its beginning and its end."""

# Each begins at `:/` (pathlib makes one slash of two) and ends before the next, so no character is looked at twice.
_URL = re.compile(r":/{1,2}(?:(?!:/)[^\s'\"<>])+")
_IN_URL = (
    re.compile(r"\A(?P<keep>:/{1,2})[^/]+(?=@)"),
    re.compile(r"\A(?P<keep>:/{1,2})[^/:]+:(?!\d+/).+(?=@)"),  # a password may hold a slash; host:port/path@x is none
    re.compile(r"(?P<keep>[?&;](?:signature|sig|(?:[a-z]+[-_])?(?:token|key|secret|password))=)[^&;]+", re.IGNORECASE),
)
_VARIABLES = (
    "HF_TOKEN|HUGGING_FACE_HUB_TOKEN|HUGGINGFACE_TOKEN|WANDB_API_KEY|GITHUB_TOKEN|GH_TOKEN|OPENAI_API_KEY|"
    "AWS_SECRET_ACCESS_KEY|AWS_SESSION_TOKEN|AZURE_STORAGE_KEY|AccountKey|SharedAccessSignature|PGPASSWORD|"
    "MYSQL_PWD|KAGGLE_KEY|X-(?:Amz|Goog)-(?:Signature|Credential|Security-Token)|AWSAccessKeyId"
)
_FORMS = (
    re.compile(rf"(?P<keep>\b(?:{_VARIABLES})['\"]?\s*[=:]\s*['\"]?)[^\s;,&'\"]+", re.IGNORECASE),
    re.compile(r"(?P<keep>\b(?:Proxy-)?Authorization['\"]?\s*[=:]\s*['\"]?(?:\w+\s+)?)[\w.~+/=-]{8,}", re.IGNORECASE),
    re.compile(r"\bhf_[A-Za-z0-9]{16,}"),
    re.compile(r"\bgh[opsur]_[A-Za-z0-9]{16,}"),
    re.compile(r"\bgithub_pat_\w{20,}"),
    re.compile(r"\bglpat-[\w-]{20,}"),
    re.compile(r"\bxox[abeprs]-[\w-]{10,}"),
    re.compile(r"\bsk-(?:proj-|ant-)?[A-Za-z0-9_-]{32,}"),
    re.compile(r"\bpypi-AgE[\w-]{50,}"),
    re.compile(r"\bAIza[\w-]{35}\b"),
    re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"),
    re.compile(r"\beyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]{8,}"),  # a JSON web token
    re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL),
)


def redact(text: str) -> str:
    """Return `text` with every secret found replaced by `***`."""
    text = _URL.sub(lambda url: _hide(url[0], _IN_URL), text)
    return _hide(text, _FORMS)


def _hide(text: str, patterns: Iterable[re.Pattern[str]]) -> str:
    for pattern in patterns:
        kept = r"\g<keep>" if "keep" in pattern.groupindex else ""
        text = pattern.sub(kept + HIDDEN, text)
    return text


_UNSEEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
    "\U000e0000-\U000e007f]"
)
"""Controls of terminals, breaks of lines, marks of direction, what has no width, and halves of surrogate pairs."""


def escaped(text: str) -> str:
    """Return `text` with all that is not seen as escapes, such as `\\n`."""
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class Lines(str):
    """A text whose line breaks are ours: each of its lines has been through `shown`."""

    __slots__ = ()

    @classmethod
    def of(cls, parts: Iterable[str], gap: str = "") -> Lines:
        """Return one line for each part, whatever is in it; all but the first begin with `gap`."""
        return cls(f"\n{gap}".join(map(shown, parts)))


def shown(text: str) -> str:
    """Return `text` as it may be printed: one line, or those of `Lines`, without secrets and control characters."""
    if isinstance(text, Lines):
        return text
    text = escaped(redact(text))
    if len(text) > MOST:
        text = f"{text[: MOST // 2]} [... {len(text) - MOST} characters ...] {text[-MOST // 2 :]}"
    return text


class RedactedRecord(logging.LogRecord):
    """A log record of one line, without secrets, whichever logger makes it and whichever handler writes it."""

    def getMessage(self) -> str:  # noqa: N802 - logging's name
        return shown(super().getMessage().strip())


class RedactingFormatter(logging.Formatter):
    """Format log lines as `shown` does, their tracebacks included."""

    def format(self, record: logging.LogRecord) -> str:
        return Lines.of(redact(super().format(record)).split("\n"))  # whole: a key has several lines
