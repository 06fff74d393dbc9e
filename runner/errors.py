"""What can go wrong, in words for whoever typed the command."""

from __future__ import annotations


class RunnerError(Exception):
    """It could not be done; the message says what, and where it helps, what to do."""


class NotAllowed(RunnerError):
    """The registry wants other credentials, or refuses these."""


class NotThere(RunnerError):
    """There is no such image, layer, container: by this name, and for this account."""


class Broken(RunnerError):
    """What came is not what was announced: another digest, another size, not an image."""


class Unreachable(RunnerError):
    """The registry does not answer, or broke off again and again."""
