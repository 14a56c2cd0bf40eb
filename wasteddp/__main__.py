"""`python -m wasteddp`: the command `wasteddp`."""

from __future__ import annotations

from wasteddp.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
