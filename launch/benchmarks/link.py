"""A slow network between two nodes on one machine: two network namespaces and a link with a given rate and delay.

    python -m launch.benchmarks.link --mbit 1000 --delay-ms 1 COMMAND...    in COMMAND, `ip netns exec a|b` are the ends

The kernel limits the rate (`tc`, a token bucket on each end). This program adds the delay: the ends are TUN devices,
and it forwards each packet from one to the other after the given time. (The kernel's `netem` would do both, but many
virtual machines do not have it.) Packets are large, so that forwarding does not become the bottleneck. Needs Linux,
iproute2, /dev/net/tun, and root.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import selectors
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path

ENDS = ("a", "b")
ADDRESSES = ("10.78.0.1", "10.78.0.2")
DEVICE = "eth0"  # of each end
MTU = 16_000  # bytes; 0.13 ms at 1 Gbit/s
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mbit", type=float, default=1000)
    parser.add_argument("--delay-ms", type=float, default=1.0, help="in each direction")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    if os.environ.get("LINK_INSIDE") != "1":
        own = [sys.executable, "-m", "launch.benchmarks.link", *sys.argv[1:]]
        fresh = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        return subprocess.run([*fresh, *own], env={**os.environ, "LINK_INSIDE": "1"}, check=False).returncode
    devices = join_namespaces(arguments.mbit)
    threading.Thread(target=carry, args=(devices, arguments.delay_ms / 1000), daemon=True).start()
    return subprocess.run(arguments.command, check=False).returncode


def join_namespaces(mbit: float) -> list[int]:
    """Create both ends. Return the file descriptors of their devices."""
    _run("mount", "-t", "tmpfs", "tmpfs", "/run")  # so that the names of the namespaces are private
    Path("/run/netns").mkdir()
    devices = []
    for end, address in zip(ENDS, ADDRESSES, strict=True):
        device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", f"tun{end}".encode(), _IFF_TUN | _IFF_NO_PI))
        _run("ip", "netns", "add", end)
        _run("ip", "link", "set", f"tun{end}", "netns", end)  # this process keeps the descriptor
        _run("ip", "-n", end, "link", "set", f"tun{end}", "name", DEVICE)
        _run("ip", "-n", end, "link", "set", "lo", "up")
        _run("ip", "-n", end, "addr", "add", f"{address}/24", "dev", DEVICE)
        _run("ip", "-n", end, "link", "set", DEVICE, "mtu", str(MTU), "txqueuelen", "1000", "up")
        shape = ["rate", f"{mbit:g}mbit", "burst", str(8 * MTU), "latency", "200ms"]
        _run("ip", "netns", "exec", end, "tc", "qdisc", "add", "dev", DEVICE, "root", "tbf", *shape)
        devices.append(device)
    return devices


def carry(devices: list[int], delay_s: float) -> None:
    """Forward each packet to the other end, `delay_s` after it arrived. Never returns."""
    waiting: deque[tuple[float, int, bytes]] = deque()  # (due, device, packet); in order, since the delay is the same
    with selectors.DefaultSelector() as selector:
        for device, other in (devices, reversed(devices)):
            selector.register(device, selectors.EVENT_READ, other)
        while True:
            timeout = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
            for key, _ in selector.select(timeout):
                try:
                    packet = os.read(key.fd, 2 * MTU)
                except BlockingIOError:
                    continue
                waiting.append((time.monotonic() + delay_s, key.data, packet))
            now = time.monotonic()
            while waiting and waiting[0][0] <= now:
                _, device, packet = waiting.popleft()
                try:
                    os.write(device, packet)
                except OSError:  # the end is down or its queue is full; networks may drop packets
                    continue


def _run(*command: str) -> None:
    subprocess.run(command, check=True)


if __name__ == "__main__":
    raise SystemExit(main())
