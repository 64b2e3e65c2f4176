"""``python -m bindllm.cli``: the command without its script."""

import sys

from bindllm.cli import main

if __name__ == "__main__":
    sys.exit(main())
