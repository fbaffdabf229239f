"""Files that are whole or absent, and folders of them with a hash of each file."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from keeptune.errors import FolderError


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: temporary name, fsync, rename, fsync of the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def link(file: Path, new: Path) -> None:
    """Give a file that is never changed a second name, or copy it to another disk."""
    try:
        os.link(file, new)
    except OSError:
        shutil.copyfile(file, new)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_file(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep a folder for this process; the lock ends with the process, however it ends.

    Raises:
        FolderError: Another process has it.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise FolderError(
                f"Another process is at work in {path}. Wait for it, or stop it first."
            ) from error
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def new_folder(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """Fill a folder under a temporary name; it appears at `path`, with its hashes, only when whole.

    A manifest with the SHA-256 of every file is added, which `verify` checks.

    Args:
        path: Where.
        replace: Whether what is there goes; else it must be nothing or an empty folder.

    Raises:
        OSError: Something is there that must stay.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    for left in path.parent.glob(f".{path.name}.*.tmp"):
        # A killed process leaves its half behind; one that is still alive is at work in it.
        if left == temporary or not _is_alive(int(left.name.split(".")[-2])):
            shutil.rmtree(left, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        files = sorted(p for p in temporary.rglob("*") if p.is_file())
        for file in files:
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        hashes = {str(p.relative_to(temporary)): sha256_file(p) for p in files}
        write_atomic(temporary / "manifest.json", json.dumps(hashes, indent=1).encode())
        if replace:
            shutil.rmtree(path, ignore_errors=True)
        temporary.replace(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(path.parent)


def is_taken(path: Path) -> bool:
    """Whether something is there that a new folder must not take the place of."""
    return path.exists() and (not path.is_dir() or any(path.iterdir()))


def refuse_unwritable(path: Path) -> None:
    """Refuse a place where nothing can be made, before any work is done for it.

    Raises:
        FolderError: A folder on the way is a file, or may not be written to.
    """
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not there.is_dir():
        raise FolderError(f"{path} cannot be made, since {there} is a file. Give another folder.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise FolderError(
            f"{path} cannot be made, since {there} may not be written to. Give another folder."
        )


def replacement(path: Path) -> Path:
    """Where what is to take the place of a folder is made; no name that a user would give."""
    return path.with_name(f".new-{path.name}")


def replace_folder(path: Path) -> None:
    """Put a whole folder, made as its `replacement`, in the place of another.

    `finish_replacing` brings what a kill interrupts to its end.
    """
    old, new = path.with_name(f".old-{path.name}"), replacement(path)
    path.replace(old)
    new.replace(path)
    sync_folder(path.parent)
    shutil.rmtree(old)


def finish_replacing(parent: Path) -> None:
    """Bring what `replace_folder` began among these folders to its end, or undo it."""
    for old in parent.glob(".old-*"):
        path = parent / old.name.removeprefix(".old-")
        if not path.exists():
            replacement(path).replace(path)
            sync_folder(parent)
        shutil.rmtree(old)
    for new in parent.glob(".new-*"):
        shutil.rmtree(new)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def read_manifest(path: Path) -> dict[str, str]:
    """The hash of each file of a folder made by `new_folder`.

    Raises:
        FolderError: There is no manifest, or it is damaged.
    """
    try:
        hashes: dict[str, str] = json.loads((path / "manifest.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise FolderError(f"{path / 'manifest.json'} cannot be read ({error}).") from error
    return hashes


def verify(path: Path) -> None:
    """Check a folder made by `new_folder` against its manifest.

    Raises:
        FolderError: A file is missing or its bytes changed; the message names it.
    """
    for name, expected in read_manifest(path).items():
        file = path / name
        if not file.is_file():
            raise FolderError(f"{file} is missing.")
        if sha256_file(file) != expected:
            raise FolderError(f"{file} is damaged: its bytes do not match the hash kept with it.")
