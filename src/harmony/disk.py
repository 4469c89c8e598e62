"""Files written whole or not at all, and a full disk told in one sentence, whoever was writing."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harmony.errors import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_REFUSED = (errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ELOOP, errno.ENOTDIR, errno.EISDIR)


def is_full(error: BaseException | None) -> bool:
    """Whether a full disk is behind an error; safetensors and torch wrap the system's error in their own."""
    while error is not None:
        if getattr(error, "errno", None) in _FULL or any(f"(os error {number})" in str(error) for number in _FULL):
            return True
        error = error.__cause__ or error.__context__
    return False


def cannot_be_used(error: BaseException) -> str | None:
    """One sentence on a path that the system refuses for what it is; None for every other error."""
    if not isinstance(error, OSError) or error.errno not in _REFUSED or error.filename is None:
        return None
    path = os.fsdecode(error.filename2 or error.filename)  # the second is where something was to be put
    shown = path if len(path) <= 100 else f"{path[:60]}...{path[-30:]}"
    return f"{shown!r} cannot be used ({(error.strerror or '').lower()}); give another path, or mend that one"


def no_room(path: Path | str | None = None) -> UserError:
    """The error for a disk that has no room for `path`, where that is known."""
    return UserError(f"no room on the disk{'' if path is None else f' at {path}'}; free some and run again")


@contextmanager
def room_explained(path: Path) -> Iterator[None]:
    """Turn a write that failed for want of room at `path` into a UserError."""
    try:
        yield
    except Exception as error:  # safetensors and torch have their own for it
        if is_full(error):
            raise no_room(path) from error
        raise


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Where to write a file that shall be at `path`: it takes its place once it is complete, and never when it is not.

    The folder is made if missing.

    Raises:
        UserError: the disk has no room.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with room_explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield aside
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
