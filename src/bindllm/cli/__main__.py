"""``python -m bindllm.cli``: the command without its script."""

import sys

from bindllm.cli import main

if __name__ == "__main__":
    if not sys.flags.safe_path:
        # `python -m` puts the working directory first, where any file could replace an optional package.
        del sys.path[0]
    sys.exit(main())
