"""Puts a library, with a record of what it was built for, into the user's cache or another folder.

setup.py imports this in an environment that may lack torch: nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .compile import PYTHON_TAG, BuildError, Built, Record, compile_extension, describe, find_target, say

LIBRARY = "_C" + (sysconfig.get_config_var("EXT_SUFFIX") or ".so")
RECORD = LIBRARY.rpartition(".")[0] + ".json"


def place(built: Built, folder: Path) -> None:
    """Moves a library and its record into a folder. A process that has loaded the old library keeps it."""
    folder.mkdir(parents=True, exist_ok=True)
    size = built.library.stat().st_size  # recorded, because loading a truncated library would crash
    with tempfile.TemporaryDirectory(prefix=".fused_ema-", dir=folder) as staging:
        library, text = Path(staging) / LIBRARY, Path(staging) / RECORD
        shutil.copyfile(built.library, library)
        shutil.copymode(built.library, library)
        text.write_text(json.dumps({**built.record, "size": size}, indent=1) + "\n", encoding="utf-8")
        # A reader in between sees no extension, never a library with the record of another.
        (folder / RECORD).unlink(missing_ok=True)
        os.replace(library, folder / LIBRARY)
        os.replace(text, folder / RECORD)


def remove(folder: Path) -> None:
    for name in (RECORD, LIBRARY):
        (folder / name).unlink(missing_ok=True)


def read_record(folder: Path) -> Record | None:
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def is_built(folder: Path, wanted: Record) -> bool:
    library = folder / LIBRARY
    return library.is_file() and read_record(folder) == {**wanted, "size": library.stat().st_size}


# ---- The user's cache ----------------------------------------------------------------------------


def cache_root() -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "fused_ema"


def cache_folder(torch_version: str) -> Path:
    return cache_root() / f"torch-{torch_version}-{PYTHON_TAG}"


def make_trusted(folder: Path) -> None:
    """Makes a folder of the cache; raises BuildError where someone else could put code there."""
    folder.parent.parent.mkdir(parents=True, exist_ok=True)
    for each in (folder.parent, folder):
        each.mkdir(mode=0o700, exist_ok=True)
        if reason := distrust(each):
            raise BuildError(f"{reason}; set XDG_CACHE_HOME to a folder of your own, or use --into")


def distrust(path: Path) -> str | None:
    """Why code in this folder or file must not be loaded, which someone else could have put there; None where it may
    be."""
    if not hasattr(os, "getuid"):
        return None
    status = path.stat()
    if status.st_uid != os.getuid():
        return f"{path} belongs to user {status.st_uid}, not to you ({os.getuid()})"
    if status.st_mode & 0o022:
        return f"{path} can be written by others: run `chmod go-w {path}`"
    return None


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Allows one build per folder at a time. The system releases the lock when the process ends."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another build in {folder}")
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # a forked child holds the open file too


def build(folder: Path | None = None, force: bool = False) -> tuple[Path, bool]:
    """Compiles the extension for the installed torch into a folder, by default the user's cache.

    Returns the library's path, and whether it was compiled now instead of found there. Raises BuildError.
    """
    torch, toolkit = find_target()
    if folder is None:
        folder = cache_folder(torch.__version__)
        make_trusted(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        if not force and is_built(folder, describe(torch, toolkit)):
            return folder / LIBRARY, False
        with tempfile.TemporaryDirectory(prefix="fused_ema-") as temp:
            place(compile_extension(Path(temp), torch, toolkit), folder)
    return folder / LIBRARY, True
