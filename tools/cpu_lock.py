"""Write a lock with the CPU build of torch, where the package index has one; else the lock as it is, and say so.

The build's hash is in no lock, so its version alone is held (`torch==2.15.0+cpu`); everything else keeps its hashes.

    VIRTUAL_ENV=... python tools/cpu_lock.py LOCK TARGET UV
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

TORCH = re.compile(r"^(torch==[\w.]+)([^\\\n]*?) *\\\n(?: +--hash=\S+(?: \\)?\n)+", re.MULTILINE)
"""The entry of torch with its hashes; one per range of Python versions."""


def main(lock: Path, target: Path, uv: str) -> None:
    """Write `target`, in the environment that VIRTUAL_ENV names."""
    text = lock.read_text(encoding="utf-8")
    changed, count = TORCH.subn(r"\1+cpu\2\n", text)
    if not count:
        raise SystemExit(f"{lock} holds no torch with hashes; make lock writes it")
    target.write_text(changed, encoding="utf-8")
    asked = [uv, "pip", "install", "--dry-run", "--no-deps", "--index-strategy", "unsafe-best-match"]
    found = subprocess.run([*asked, "-c", str(target), "torch"], capture_output=True, text=True, check=False)
    if found.returncode:
        target.write_text(text, encoding="utf-8")
        why = found.stderr.strip().splitlines()[-1].strip() if found.stderr.strip() else "no reason given"
        print(f"TORCH=cpu: the package index has no CPU build of torch, so the one with CUDA is installed ({why})")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
