"""`python -m llmdrop_vllm.cli COMMAND ...`: the same as `llmdrop COMMAND ...`."""

import sys

from llmdrop_vllm.cli import main

if __name__ == "__main__":
    sys.exit(main())
