"""Draws every world of the truth table and prints the rates: `python -m tests.truth`."""

import argparse

from tests.truth import cases, table


def main() -> None:
    """Prints the table; fails where a case misses its target."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--only", default="", help="text that the names of cases hold")
    arguments = parser.parse_args()
    chosen = [case for case in cases.CASES if arguments.only in case.name]
    rates = [(case, table.rate(case, arguments.draws)) for case in chosen]
    print(table.page(rates, arguments.draws))
    missed = [case.name for case, found in rates if not table.meets(case, found, arguments.draws)]
    for name in missed:
        print(f"misses its target: {name}")
    raise SystemExit(bool(missed))


if __name__ == "__main__":
    main()
