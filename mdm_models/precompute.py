"""`python -m mdm_models.precompute` is `mdm precompute`, which is in mdm_models.commands.precompute."""

import sys

from mdm_models.commands.precompute import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
