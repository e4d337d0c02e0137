"""A line between two network namespaces that delays packets and loses some, where the kernel has no netem.

    python line.py NAMESPACE NAMESPACE SECONDS SHARE

Each namespace gets a TUN device `slow`; what it sends, this process hands to the other's after SECONDS, or drops. On
SIGTERM it prints how many packets it has carried and lost.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import heapq
import os
import random
import select
import signal
import struct
import sys
import time
from typing import NoReturn

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
CLONE_NEWNET = 0x40000000


def device(namespace: str) -> int:
    """Make the device in a namespace; return what reads and writes its packets."""
    own = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    if ctypes.CDLL(None, use_errno=True).setns(own, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), f"setns {namespace}")
    made = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(made, TUNSETIFF, struct.pack("16sH", b"slow", IFF_TUN | IFF_NO_PI))
    return made


def main(first: str, second: str, delay: float, share: float) -> NoReturn:
    """Carry packets until SIGTERM."""
    ends = [device(first), device(second)]
    other, draw = {ends[0]: ends[1], ends[1]: ends[0]}, random.Random(1)
    waiting: list[tuple[float, int, int, bytes]] = []
    carried = lost = 0

    def stop(*_: object) -> NoReturn:
        print(carried, lost, flush=True)
        sys.exit(0)

    signal.signal(signal.SIGTERM, stop)
    print("ready", flush=True)
    while True:
        patience = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        for end in select.select(ends, [], [], patience)[0]:
            packet = os.read(end, 65536)
            if draw.random() < share:
                lost += 1
            else:
                carried += 1
                heapq.heappush(waiting, (time.monotonic() + delay, carried, other[end], packet))
        while waiting and waiting[0][0] <= time.monotonic():
            _, _, end, packet = heapq.heappop(waiting)
            with contextlib.suppress(OSError):  # a device that is not up yet
                os.write(end, packet)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]), float(sys.argv[4]))
