"""The one error of the lab, so that a caller can tell a mistake of the user from a bug with one `except`."""


class LabError(RuntimeError):
    """What was asked, where, why it cannot be done, and what to do instead."""
