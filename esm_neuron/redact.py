"""Remove secrets from text before it goes to a terminal, a log or a file.

The patterns find passwords in URLs, signatures and tokens of signed URLs (S3, Azure, Google), tokens of the Hugging
Face hub and of GitHub, AWS keys, and what follows a name such as `password=`, `HF_TOKEN=`, `AccountKey=` or
`x-api-key:`, or a flag such as `--token`.
"""

from __future__ import annotations

import logging
import re

HIDDEN = "***"
"""Written in place of a secret."""

_WHOLE = r"x-(?:amz|goog)-(?:signature|credential|security-token)|awsaccesskeyid|aws_access_key_id|signature|sig"
_ENDS = r"(?:api|access|secret|account)[-_]?key|token|password|passwd|secret"
# The lookbehind starts each search at the start of a word, so that time does not grow with the square of its length.
_NAME = rf"(?<![\w-])(?:(?:[\w-]*-)?(?:{_WHOLE})|[\w-]*(?:{_ENDS}))"
_PATTERNS = (
    re.compile(r"(?P<keep>:/{1,2})[^\s/'\"]+(?=@)"),  # pathlib makes one slash of two
    # comes before the names, which would hide only the word Bearer of `X-Auth-Token: Bearer V`
    re.compile(r"(?P<keep>\b(?:bearer|basic)\s+)[\w.~+/=-]{8,}", re.IGNORECASE),
    re.compile(rf"(?P<keep>{_NAME}['\"]?\s*[=:]\s*['\"]?)[^\s&'\",;)\]}}]+", re.IGNORECASE),
    re.compile(rf"(?<!\S)(?P<keep>--[\w.-]*?(?:{_WHOLE}|{_ENDS})(?:\s+|=))(?!-)\S+", re.IGNORECASE),
    re.compile(r"\bhf_[A-Za-z0-9]{16,}"),
    re.compile(r"\bgh[opsur]_[A-Za-z0-9]{16,}"),
    re.compile(r"\bgithub_pat_\w{20,}"),
    re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"),
)


def redact(text: str) -> str:
    """Return `text` with every secret found replaced by `***`."""
    for pattern in _PATTERNS:
        kept = r"\g<keep>" if "keep" in pattern.groupindex else ""
        text = pattern.sub(kept + HIDDEN, text)
    return text


class RedactedRecord(logging.LogRecord):
    """A log record without secrets, whichever logger makes it and whichever handler writes it."""

    def getMessage(self) -> str:  # noqa: N802 - logging's name
        return redact(super().getMessage())


class RedactingFormatter(logging.Formatter):
    """Format log lines without secrets, their tracebacks included."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))
