"""Errors that a user can mend. Their message is one line that says how."""


class UsageError(ValueError):
    """Something the caller gave is wrong; the message names the mend."""


class MissingExtraError(UsageError, ImportError):
    """A package of an optional extra is not installed."""

    def __init__(self, package: str, extra: str):
        super().__init__(
            f"this needs the package '{package}', which is not installed: "
            f"run `pip install 'eqx_q[{extra}]'`"
        )


class DivergedError(UsageError):
    """Training produced a loss that is not finite."""


class CorruptFileError(UsageError):
    """A file of ours is damaged or is not ours."""
