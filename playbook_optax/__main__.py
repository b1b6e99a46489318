"""``python -m playbook_optax``, the command line by another name."""

import sys

from playbook_optax.cli import main

if __name__ == "__main__":
    sys.exit(main())
