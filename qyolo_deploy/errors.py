"""Errors that reach the user: one sentence each, a hint where there is a way out, and an exit code."""


class QyoloError(Exception):
    """Base of all errors that `qyolo` explains to its user.

    Args:
        message: One sentence that names the file, the key and what was expected.
        hint: What to do about it, if there is something.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class GateFailedError(QyoloError):
    """A gate of the recipe did not hold."""

    exit_code = 1


class SelftestError(QyoloError):
    """An engine computes something else here than the release says."""

    exit_code = 1


class InputError(QyoloError):
    """A recipe, dataset, checkpoint, engine file or argument is not usable."""

    exit_code = 2


class RuntimeMissingError(QyoloError):
    """A runtime, device or optional package that the request needs is not there."""

    exit_code = 3


class IntegrityError(QyoloError):
    """A released or recorded file is missing, surplus or not what its digest says."""

    exit_code = 4
