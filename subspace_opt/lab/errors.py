"""The error class of the lab. A caller can tell a mistake of the user from a bug with one `except`."""


class LabError(RuntimeError):
    """A request cannot be carried out; the message says why and what to do instead."""
