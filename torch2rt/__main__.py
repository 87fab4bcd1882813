"""`python -m torch2rt`: the `torch2rt` command."""

import sys

from torch2rt.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
