"""`mdm models`: the names of the models."""

import argparse
import sys

from mdm_models.zoo import list_models


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="mdm models", description="The names of the models.")
    parser.add_argument("pattern", nargs="?", default="*", help="a shell wildcard, such as 'mdm_t2v_*'")
    options = parser.parse_args(arguments)
    names = list_models(options.pattern)
    if not names:
        print(f"error: no model matches {options.pattern!r}; known are {', '.join(list_models())}", file=sys.stderr)
        return 2
    print("\n".join(names))
    return 0
