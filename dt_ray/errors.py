"""One exception for each kind of mistake that a user can mend. Commands print it without a traceback and exit 2."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can mend: the message says what was given, what is allowed and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def __str__(self) -> str:
        return self.message  # and not `args`, to which Ray Data appends advice on its own settings


class ConfigError(UserError):
    """The configuration is wrong; the message lists every problem found."""


class DataError(UserError):
    """A dataset is missing, unreadable or holds values no policy can be trained on."""


class UnsupportedSpaceError(UserError):
    """The environment's observations or actions are not 1-D continuous vectors."""


class BrokenEnvironmentError(UserError):
    """An environment crashed, or answered what no policy can act on; the message names seed and step."""


class RunError(UserError):
    """A run folder or a checkpoint can't be used as asked."""


class StorageError(UserError):
    """A disk or an object store can't be reached, read or written."""


class ResourceError(UserError):
    """The machine or cluster has less than the run asks for."""


class EnvironmentCrashError(UserError):
    """An environment ends the process that plays it."""


class DivergedError(UserError):
    """Training stopped because the loss is no longer a number."""
