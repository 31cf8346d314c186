"""The one exception hierarchy. Every message says what is wrong, where, and the remedy, in one line.

The command line prints the message and exits with ``exit_code``; nothing else in the package exits or prints a
traceback for an error that a user can cause.
"""

from __future__ import annotations


class SkimError(Exception):
    """Base of every error that SkimTVM raises on purpose."""

    exit_code = 1


class InvalidModel(SkimError):
    """The ONNX file cannot be read, is damaged, or breaks the ONNX rules."""

    exit_code = 3


class UnsupportedModel(SkimError):
    """A valid ONNX model that uses an operator, dtype or dynamic shape which cannot be compiled."""

    exit_code = 4


class UnboundShape(UnsupportedModel):
    """An input dimension has no value; bind it with ``--input-shape`` or ``--batch``."""


class UnsupportedWorkload(SkimError):
    """A kernel was asked for a workload outside of its domain."""

    exit_code = 4


class InvalidOption(SkimError):
    """An option or argument has a value that makes no sense for this model."""

    exit_code = 2


class OutputExists(SkimError):
    """The output exists (and overwriting was not asked for) or cannot be written."""

    exit_code = 5


class InvalidArtifact(SkimError):
    """The .so is not a SkimTVM module, is truncated, or was made by another version."""

    exit_code = 6


class IncompatibleTarget(InvalidArtifact):
    """The module was compiled for an instruction set that this CPU does not have."""


class InputMismatch(SkimError):
    """An input array has the wrong name, shape, dtype or memory layout."""

    exit_code = 7


class EnvironmentProblem(SkimError):
    """The installation is broken: a wrong tvm-ffi build, no linker, no numerics library."""

    exit_code = 8


class ServingError(SkimError):
    """A request that the server answers with an error; ``status`` is the HTTP status of the answer."""

    status = 500

    def __init__(self, message: str, *, status: int | None = None) -> None:
        super().__init__(message)
        if status is not None:
            self.status = status


class InvalidRequest(ServingError):
    """A request that breaks the protocol, or asks for what this model does not have."""

    status = 400


class RequestTooLarge(ServingError):
    """A request body beyond the server's limit."""

    status = 413


class Overloaded(ServingError):
    """The server has as many requests as it takes, or no worker to run them; ask again later."""

    status = 503


class TimedOut(ServingError):
    """The request was not answered within the server's time limit."""

    status = 504


class InternalError(SkimError):
    """A pass left the module in a state that violates an invariant: a bug in SkimTVM, please report it."""

    exit_code = 70
