"""How a run starts: scripts, launch configurations, benchmarks."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # of the checkout: what is started here starts there
