"""Every error a user can meet: what was wrong, where, and what to do about it.

One exception tree, one line per message: ``WHERE: WHAT. REMEDY``.  Entry points print the line and exit with 2;
anything that is not a `BitdistillError` is a bug and keeps its traceback.
"""

from __future__ import annotations


class BitdistillError(Exception):
    """Base of all errors that a user can mend.

    `where` names the key, file, tensor or host; `what` says what is wrong with it, values included; `remedy` is an
    imperative sentence.
    """

    def __init__(self, where: str, what: str, remedy: str) -> None:
        self.where, self.what, self.remedy = where, what, remedy
        super().__init__(f"{where}: {what}. {remedy}")

    def __reduce__(self) -> tuple[type[BitdistillError], tuple[str, str, str]]:
        return type(self), (self.where, self.what, self.remedy)  # survives Ray's pickling with its three parts


class ConfigError(BitdistillError):
    """A recipe or an override that cannot be run: unknown key, wrong type, impossible combination."""


class ModelError(BitdistillError):
    """A model, tokenizer or checkpoint that cannot be loaded, or of a family that is not supported."""


class DataError(BitdistillError):
    """A corpus that cannot be read: not UTF-8, a missing column, an empty source, a document past the limit."""


class StorageError(BitdistillError):
    """Object storage or a disk that refuses: no such bucket, no access, no space left."""


class TeacherError(BitdistillError):
    """A teacher that cannot answer: wrong vocabulary or tokenizer, no live actor, a timeout."""


class ResourceError(BitdistillError):
    """A cluster without the CPUs or GPUs that were asked for."""


class PackedError(BitdistillError):
    """A packed student whose bytes are not what its header promises."""


class KernelError(BitdistillError):
    """A shape, format or instruction set that the compiled kernels do not support."""


class ServeError(BitdistillError):
    """A serving application that cannot start as configured."""
