"""``python -m stillhouse.core.theory``: prints the known values beside the computed ones; exit code 1 if one
differs."""

from __future__ import annotations

import sys

from .checks import run_checks


def main() -> int:
    """Prints the table and returns the exit code."""
    checks = run_checks()
    width = max(len(check.name) for check in checks)
    for check in checks:
        mark = "ok  " if check.passed else "FAIL"
        print(f"{mark}  {check.name:<{width}}  {check.computed:>12.6g}   {check.expected}")
    failed = sum(not check.passed for check in checks)
    print(f"{len(checks)} checks, {failed} failed" if failed else f"{len(checks)} checks, all as expected")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
