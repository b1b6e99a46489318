"""``python -m tests.mutation [--only TEXT]``: what the tests do not notice."""

import argparse
import pathlib
import sys
import tempfile

from tests.mutation import run
from tests.mutation.mutations import MUTATIONS

parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
parser.add_argument("--only", default="", help="a number in the list, or part of a name or file")
only = parser.parse_args().only
if only.isdigit():
    chosen = MUTATIONS[int(only) : int(only) + 1]
else:
    chosen = tuple(one for one in MUTATIONS if only in one.name or only in one.file)
with tempfile.TemporaryDirectory() as folder:
    outcomes = run.run_all(pathlib.Path(folder), chosen)
sys.exit(any(not one.killed and not one.mutation.survives for one in outcomes))
