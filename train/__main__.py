"""`python -m fastgen.train ...` is `fastgen train ...`."""

import sys

from fastgen.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
