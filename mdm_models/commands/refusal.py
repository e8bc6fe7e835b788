"""Why a command line is refused, in one line. tyro says it in a box of many and offers no other way, so that the box is
read here: a title, then parts with a rule between them, the first of which is the reason."""

import contextlib
import difflib
import io
import os
import re
from collections.abc import Callable, Iterator

Parse = Callable[[list[str]], object]
"""parse(arguments): prints what is wrong with them, or help, and raises SystemExit"""

BORDER = r"(?m)^(?:│ | {2}|╰─+╯)|[ │╮]+$"  # tyro draws boxes in ASCII where the output is not known to be UTF-8
ONE_COLUMN, UNWRAPPED = "129", "10000"  # a terminal's width; in a wider one tyro puts boxes of options side by side


def refusal(parse: Parse, program: str, arguments: list[str]) -> str:
    """What is wrong with arguments that `parse` refuses: a subcommand that does not exist, the first option that does
    not, else what tyro says."""
    subcommand = [argument for argument in arguments[:1] if not argument.startswith("-")]
    shown = _printed(parse, [*subcommand, "--help"], ONE_COLUMN)
    usage = re.match(r"usage: (.*?) \[-h\]", shown)
    see = f"see {usage[1] if usage else program} --help"
    subcommands = re.match(r"usage: .*? \[-h\] \{([\w,-]+)\}\n", shown)
    if subcommands and subcommand:
        return _unlike(subcommand[0], subcommands[1].split(","), see)
    known = [name for line in re.findall(r"(?m)^(?:│ | {2})(-.*)", shown) for name in _options(line)]
    for argument in arguments if known else []:
        name = argument.partition("=")[0].replace("_", "-")
        if re.match("--?[a-zA-Z]", name) and name not in known:
            near = difflib.get_close_matches(name.lstrip("-"), [option.lstrip("-") for option in known], n=1)
            return f"{name}: no such option" + (f"; did you mean --{near[0]}?" if near else ";") + f" {see}"
    title, _, said = re.sub(BORDER, "", _printed(parse, arguments, UNWRAPPED)).partition("\n")
    reason, *advice = [part.strip("\n") for part in re.split(r"(?m)^ ?[─-]+$", said) if part.strip()] or [title]
    if "Required options" in title:
        missing = ", ".join(re.findall(r"(?m)^ {4}(\S+)", reason))
        return f"{missing}: must be given; {see}"
    if value := re.match(r"Error parsing (\S+): ([^\n]*)", reason):
        expected = re.search(r"(?m)^Argument helptext:\n *(.*)", "\n".join(advice))
        return f"{value[1]}: {value[2].rstrip('.')}; expected {expected[1]}; {see}" if expected else value[2]
    return f"{reason.rstrip('.')}; {see}"


def _unlike(name: str, choices: list[str], see: str) -> str:
    """That `name` is none of the subcommands."""
    near = difflib.get_close_matches(name, choices, n=1)
    advice = f"did you mean {near[0]}?" if near else f"known are {', '.join(choices)};"
    return f"{name}: no such subcommand; {advice} {see}"


def _options(line: str) -> list[str]:
    """The names in a line of the help text that begins with an option, whose purpose follows after two spaces."""
    return re.findall(r"(?<!\S)--?[\w-]+", line.partition("  ")[0])


def _printed(parse: Parse, arguments: list[str], width: str) -> str:
    printed = io.StringIO()
    output = contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed)
    with _columns(width), output[0], output[1], contextlib.suppress(SystemExit, ValueError):
        parse(arguments)
    return printed.getvalue()


@contextlib.contextmanager
def _columns(width: str) -> Iterator[None]:
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = width
    try:
        yield
    finally:
        del os.environ["COLUMNS"]
        if before is not None:
            os.environ["COLUMNS"] = before
