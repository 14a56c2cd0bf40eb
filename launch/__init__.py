"""How a run starts: scripts, launch configurations, benchmarks."""
