"""Scripts, launch configurations and benchmarks."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # of the checkout, the working directory of all started programs
