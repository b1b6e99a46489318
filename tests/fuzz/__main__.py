"""``python -m tests.fuzz --cases N --seed S``: the fuzzer by hand."""

import argparse
import sys
import tempfile

from tests.fuzz import cases

parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
parser.add_argument("--cases", type=int, default=1000)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--first", type=int, default=0, help="number of the first case")
parser.add_argument("--draws", action="store_true", help="let reports draw their plots")
parser.add_argument("--kind", help="only these cases: spec, block, header, frame, ...")
parser.add_argument("--most", type=int, default=20, help="failures after which to stop")
given = parser.parse_args()
with tempfile.TemporaryDirectory() as folder:
    failures = cases.run(
        folder,
        given.cases,
        given.seed,
        given.first,
        given.most,
        tell=lambda text: print(text, flush=True),
        draws=given.draws,
        kind=given.kind,
    )
print(f"{len(failures)} failures")
sys.exit(bool(failures))
