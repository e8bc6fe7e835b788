"""Triton's interpreter without its repetitions. Before each call of a function inside a kernel it goes through its
whole language to replace what it has replaced already: half of the time of the tests that run kernels."""

import triton.language as tl
from triton.runtime import interpreter


class Nothing:
    """What was replaced where all had been replaced before."""

    def restore(self) -> None:
        pass


def patch_once() -> None:
    """Have the interpreter replace the functions of a language module only where they are still the compiler's."""
    patch_lang = interpreter._patch_lang
    languages: dict[object, list] = {}  # by function, the names of its module that are Triton's language

    def patch_what_is_not(function):
        if function not in languages:
            languages[function] = [value for value in function.__globals__.values() if value is tl or value is tl.core]
        if all(not tl.core.is_builtin(language.load) for language in languages[function]):
            return Nothing()
        return patch_lang(function)

    interpreter._patch_lang = patch_what_is_not
