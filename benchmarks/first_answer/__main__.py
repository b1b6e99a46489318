"""Runs the rows: `python -m benchmarks.first_answer [--quick] [--rows again,tune] ...`."""

import argparse
import pathlib

import benchmarks.first_answer
from benchmarks.first_answer import rows


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line and runs.

    Args:
      arguments: the command line's; those of the process if None.
    """

    def names(text: str) -> tuple[str, ...]:
        chosen = tuple(text.split(","))
        unknown = [name for name in chosen if name not in rows.ROWS]
        if unknown:
            known = ", ".join(rows.ROWS)
            raise argparse.ArgumentTypeError(f"{unknown} unknown; known: {known}")
        return chosen

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.first_answer",
        description=benchmarks.first_answer.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="short and rough")
    add("--rows", type=names, help="such as again,tune")
    add("--rounds", type=int, help=f"of each row; {rows.ROUNDS} if not given, with --quick 1")
    add("--out", type=pathlib.Path, help="file of results, continued if it is there")
    given = parser.parse_args(arguments)
    available = rows.available(given.quick)
    chosen = tuple(name for name in given.rows or rows.ROWS if name in available)
    if left_out := [name for name in given.rows or rows.ROWS if name not in available]:
        print(f"left out, for they are long or need Optuna: {', '.join(left_out)}")
    num_rounds = given.rounds or (1 if given.quick else rows.ROUNDS)
    rows.run(chosen, num_rounds, given.quick, given.out)


if __name__ == "__main__":
    main()
