"""Runs the suite, or writes its table: `python -m benchmarks.speed [--quick] [--table] ...`."""

import argparse
import pathlib

from benchmarks.speed import suite, table, workloads


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line and runs.

    Args:
      arguments: the command line's; those of the process if None.
    """

    def names(known: tuple[str, ...]):
        def parse(text: str) -> tuple[str, ...]:
            chosen = tuple(text.split(","))
            unknown = [name for name in chosen if name not in known]
            if unknown:
                raise argparse.ArgumentTypeError(f"{unknown} unknown; known: {', '.join(known)}")
            return chosen

        return parse

    cases, available = tuple(workloads.CASES), suite.available()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="short and rough")
    add("--only", type=names(cases), default=cases, help="workloads, such as mlp,tiny")
    add("--trials", type=lambda text: tuple(map(int, text.split(","))), help="such as 1,8")
    add("--contenders", type=names(available), default=available, help="such as loop,scan")
    add("--parts", type=names(suite.PARTS), default=suite.PARTS, help=",".join(suite.PARTS))
    add("--seconds", type=float, default=30.0, help="for the rounds of one case; 30 if not given")
    add("--out", type=pathlib.Path, help="file of results, continued if it is there")
    add("--table", action="store_true", help="print the stored results' table, into README.md too")
    given = parser.parse_args(arguments)
    if given.table:
        print(table.write_readme())
        return
    trials = given.trials or (workloads.QUICK_TRIALS if given.quick else workloads.TRIALS)
    options = suite.Options(
        given.only, trials, given.contenders, given.parts, given.quick, given.seconds
    )
    with suite.Suite(options, given.out) as running:
        running.run()
        print(f"written to {running.path}")


if __name__ == "__main__":
    main()
