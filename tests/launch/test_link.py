"""The link of the network benchmark has at most the given rate and at least the given delay."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MEASURE = "import json; from launch.benchmarks.network import measure_link; print(json.dumps(measure_link(5_000_000)))"
POSSIBLE = os.getuid() == 0 and Path("/dev/net/tun").exists() and shutil.which("tc", path="/usr/sbin:/sbin:/usr/bin")


@pytest.mark.skipif(not POSSIBLE, reason="needs root, /dev/net/tun and tc (iproute2)")
def test_a_link_has_the_rate_and_the_delay_asked_for() -> None:
    link = [sys.executable, "-m", "launch.benchmarks.link", "--mbit", "50", "--delay-ms", "5"]
    done = subprocess.run([*link, sys.executable, "-c", MEASURE], cwd=ROOT, capture_output=True, text=True, check=True)
    rate_mbit, round_trip_ms = json.loads(done.stdout)
    assert round_trip_ms >= 2 * 5
    assert rate_mbit <= 1.3 * 50  # the content of the bucket is sent immediately at the start
