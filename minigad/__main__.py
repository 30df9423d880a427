"""Let `python -m minigad` be the same as the command `minigad`."""

import sys

from minigad.cli import main

if __name__ == "__main__":
    sys.exit(main())
