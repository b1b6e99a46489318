"""`python -m benchmarks.claims [case ...]` runs the cases, or all; `--page` writes the page."""

import sys

import playbook_optax as pbx
from benchmarks.claims import stability


def main():
    pbx.use_cpu_cores()
    names = [name for name in sys.argv[1:] if name != "--page"]
    if "--page" not in sys.argv:
        names = names or list(stability.CASES)
    unknown = [name for name in names if name not in stability.CASES]
    if unknown:
        sys.exit(f"unknown: {', '.join(unknown)}; known: {', '.join(stability.CASES)}")
    stability.run(names)
    stability.write_page()


if __name__ == "__main__":
    main()
