"""Draws every world of the truth table and prints the rates: `python -m tests.truth`."""

import argparse
import pathlib

from tests.truth import cases, table

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "verdict_rates.md"


def main() -> None:
    """Prints the table, or writes it into its page; fails where a case misses its target."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--only", default="", help="text that the names of cases hold")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}, printing nothing")
    arguments = parser.parse_args()
    if arguments.write and arguments.only:
        parser.error("the page holds all cases: leave out --only or --write")
    chosen = [case for case in cases.CASES if arguments.only in case.name]
    rates = [(case, table.rate(case, arguments.draws)) for case in chosen]
    told = table.page(rates, arguments.draws)
    if arguments.write:
        PAGE.write_text(table.between(PAGE.read_text(), told))
    else:
        print(told)
    missed = [case.name for case, found in rates if not table.meets(case, found, arguments.draws)]
    for name in missed:
        print(f"misses its target: {name}")
    raise SystemExit(bool(missed))


if __name__ == "__main__":
    main()
