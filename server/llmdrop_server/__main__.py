"""`python -m llmdrop_server MODEL ...`: the same as `llmdrop serve MODEL ...`."""

import sys

from llmdrop_server.launch import main

if __name__ == "__main__":
    sys.exit(main())
