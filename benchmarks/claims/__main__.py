"""`python -m benchmarks.claims [workload ...]`: runs the cases that are named, or all."""

import sys

import playbook_optax as pbx
from benchmarks.claims import stability


def main():
    pbx.use_cpu_cores()
    names = sys.argv[1:] or list(stability.CASES)
    unknown = [name for name in names if name not in stability.CASES]
    if unknown:
        sys.exit(f"unknown: {', '.join(unknown)}; known: {', '.join(stability.CASES)}")
    stability.run(names)


if __name__ == "__main__":
    main()
