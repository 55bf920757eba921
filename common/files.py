"""Files that are whole or not there, also when the program is killed or the machine goes down while writing."""

import errno
import fcntl
import json
import os
import re
import tempfile
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from common.errors import InputError, and_more

OWN_FILES = ".diffueraser.json"  # in a folder of results: {file or folder that we made there: its number of files}


@contextmanager
def written_whole(path):
    """Gives a path beside `path` to write to, which is flushed and renamed then: whoever reads finds the old content or
    the new one. Several processes may write the same file."""
    path = Path(path)
    partial = path.with_name(f".{uuid4().hex}.partial")  # the file's own name may be as long as a name can be
    try:
        yield partial
        flush(partial)
        partial.replace(path)
    except OSError as error:
        # A write's error, such as on a full disk, names no file. A library's own is a text alone.
        if error.strerror and error.filename is None:
            error.filename = os.fspath(path)
        raise
    finally:
        partial.unlink(missing_ok=True)


def write_json(path, content):
    """What can be JSON, indented, as a whole."""
    with written_whole(path) as partial:
        partial.write_text(json.dumps(content, indent=1))


def check_writable(folder, flag):
    """Make `folder` if need be. Raises InputError, naming the flag, where nothing can be written to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"{flag} {folder} cannot be written to ({error.strerror}): choose another") from None


def refuse_foreign(folder, names, overwrite, flag="--output_dir"):
    """Raise InputError where `folder` holds one of `names` (files or folders) that no earlier result made: it is the
    user's own, and is not replaced unless `overwrite`, the user's --overwrite, says so."""
    blocked = [path for path in (Path(folder, name) for name in names) if not is_replaceable(path)]
    if blocked:
        raise InputError(f"{blocked[0]} cannot be replaced (a folder, or read-only): move it, or choose another {flag}")
    earlier = read_own(folder)
    foreign = [name for name in names if name not in earlier and is_filled(Path(folder, name))]
    if foreign and not overwrite:
        raise InputError(
            f"{flag} {folder} holds {foreign[0]}{and_more(foreign)}, which no earlier result made: choose another "
            "folder, or add --overwrite to replace it"
        )


def note_own(folder, names):
    """Note in `folder` that {file or folder: number of files} are ours; returns what was noted before."""
    earlier = read_own(folder)
    write_json(Path(folder, OWN_FILES), {**earlier, **names})
    return earlier


def read_own(folder):
    try:
        return dict(json.loads(Path(folder, OWN_FILES).read_text()))
    except (OSError, ValueError, TypeError):  # none, or not ours: then nothing is
        return {}


def is_replaceable(path):
    """Whether a file may be written at `path`; a name without an ending may be a folder's."""
    return not path.exists() or (os.access(path, os.W_OK) and not (path.suffix and path.is_dir()))


def is_filled(path):
    """Whether something is there that is no empty folder."""
    return os.path.lexists(path) and not (path.is_dir() and not any(path.iterdir()))


@contextmanager
def locked(folder):
    """Nobody else may hold `folder` meanwhile, on any machine that shares it. Raises InputError where somebody does.

    A lock of the process: loader workers do not inherit it, and it ends with the process however that ends.
    """
    with open(Path(folder, ".lock"), "w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # POSIX allows both
            raise InputError(f"another run is writing to {folder}: stop it, or choose another --output_dir") from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):  # a file system without locks
                raise
        yield


def list_numbered(folder, name):
    """[(number, path)] of what is called <name>-<number> in a folder, by number; [] where there is no folder."""
    if not Path(folder).is_dir():
        return []
    matches = ((re.fullmatch(rf"{name}-(\d+)", path.name), path) for path in Path(folder).iterdir())
    return sorted((int(match[1]), path) for match, path in matches if match)


def flush(path):
    """Wait until a file's, or a folder's, content is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
