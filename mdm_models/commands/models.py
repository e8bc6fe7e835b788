"""The names of the models, which `mdm_models.create_model` makes.

  mdm models
  mdm models "mdm_t2v_*"
  mdm models --pretrained
"""

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg

from mdm_models.commands.line import command
from mdm_models.zoo import list_models


@dataclass(frozen=True)
class Options:
    pattern: Annotated[Positional[str], arg(metavar="PATTERN")] = "*"
    """a shell wildcard"""
    pretrained: bool = False
    """those whose weights come with this package"""


def show(options: Options) -> None:
    """Print the names. Raises ValueError if none matches."""
    names = list_models(options.pattern, options.pretrained)
    if not names:
        known = ", ".join(list_models(pretrained=options.pretrained)) or "none"
        raise ValueError(f"no model matches {options.pattern!r}; known are {known}")
    print("\n".join(names))


main = command("models", __doc__, Options, show)
