"""The two ways in which a command can fail, and their exit status.

Messages are one line of the form ``Expected name=value to be ..., got ...: remedy.``
"""


class InputError(ValueError):
    """Something that the user gave is wrong: exit status 2, nothing was written."""


class RunError(RuntimeError):
    """Something failed on the way: exit status 1, what was saved before stays valid."""


class DivergedError(RunError):
    """Weights, gradients or images are no longer finite numbers."""


class PeerError(RunError):
    """Another process of the same run failed, and has said so."""
