"""`python -m sglang_hicache.ctl`, for where the console script is not on the path."""

import sys

from sglang_hicache.ctl.main import main

if __name__ == "__main__":
    sys.exit(main())
