"""`python -m mdm_models.convert` is `mdm convert`, which is in mdm_models.commands.convert."""

import sys

from mdm_models.commands.convert import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
