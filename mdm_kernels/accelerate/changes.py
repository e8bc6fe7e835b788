"""Changes to a model's modules that can be taken back."""

from collections.abc import Callable

from torch import nn


class Changes:
    """A list of changes, each of which is taken back only while the module is still as the change left it."""

    def __init__(self):
        self._restore: list[Callable[[], None]] = []

    def set_class(self, module: nn.Module, to: type[nn.Module], **attributes) -> None:
        """Make `module` an instance of a subclass of its class, with attributes that the subclass needs.

        Parameters, buffers, hooks and everybody's references to the module stay what they are.
        """
        before = type(module)
        module.__class__ = to
        for name, value in attributes.items():
            setattr(module, name, value)

        def restore():
            if type(module) is to:
                module.__class__ = before
                for name in attributes:
                    delattr(module, name)

        self._restore.append(restore)

    def set_attribute(self, module: nn.Module, name: str, value: object) -> None:
        """Put `value` in the place of an attribute or submodule that `module` has."""
        before = getattr(module, name)
        setattr(module, name, value)

        def restore():
            if getattr(module, name, None) is value:
                setattr(module, name, before)

        self._restore.append(restore)

    def undo(self) -> None:
        """Take all changes back, the last one first; a second call does nothing."""
        while self._restore:
            self._restore.pop()()
