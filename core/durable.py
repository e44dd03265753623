"""Durable files: written under a draft's name, flushed, then given their own, so that no crash leaves half of one.

A wait for the disk costs much the same whatever was written. So many files wait together, for their whole file system,
where `syncfs` is known to wait for the disk itself and to tell of errors, as `fsync` does.
"""

import contextlib
import ctypes
import os
import secrets
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

_EXT4, _XFS, _BTRFS = 0xEF53, 0x58465342, 0x9123683E


def write(path: Path, data: bytes) -> None:
    """Write one file, and its folders where they are missing."""
    while True:
        draft = _draft(str(path), data, flush=True)
        try:
            os.rename(draft, path)
        except FileNotFoundError:
            continue  # taken for one that a writer had left behind
        _flush_folder(path.parent)
        return


def write_together(root: Path, files: Mapping[Path, bytes]) -> None:
    """Write files below `root`, whose file system `can_flush`, in two waits for the disk."""
    drafts: dict[Path, str] = {}
    try:
        with _flushed(root):
            for path, data in files.items():
                drafts[path] = _draft(str(path), data, flush=False)
        with _flushed(root):
            for path, draft in drafts.items():
                try:
                    os.rename(draft, path)
                except FileNotFoundError:  # taken for one that a writer had left behind
                    write(path, files[path])
    except BaseException:
        for draft in drafts.values():
            with contextlib.suppress(OSError):
                os.unlink(draft)
        raise


def can_flush(folder: Path) -> bool:
    """Whether the folder's file system can be flushed as a whole: ext4, XFS and Btrfs from Linux 5.8 on."""
    if sys.platform != "linux" or tuple(map(int, os.uname().release.split(".")[:2])) < (5, 8):
        return False
    told = ctypes.create_string_buffer(256)  # struct statfs: its first word is the file system's type
    if _libc().statfs(os.fsencode(folder), told) != 0:
        return False
    return ctypes.c_long.from_buffer(told).value in (_EXT4, _XFS, _BTRFS)


@contextlib.contextmanager
def _flushed(folder: Path) -> Iterator[None]:
    """What is written inside, anywhere on the folder's file system, is durable after."""
    descriptor = os.open(folder, os.O_RDONLY)  # before the first write: errors since then are told
    try:
        yield
        if _libc().syncfs(descriptor) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    finally:
        os.close(descriptor)


def _draft(path: str, data: bytes, flush: bool) -> str:
    while True:
        draft = f"{path}#{secrets.randbits(63)}"  # a form that listing passes over
        try:
            with open(draft, "xb") as file:  # not a Path: there are thousands a second
                file.write(data)
                if flush:
                    file.flush()
                    os.fsync(file.fileno())
            return draft
        except FileNotFoundError:
            _make_folder(Path(path).parent, flush)  # or a delete has just removed the empty one
        except BaseException:
            Path(draft).unlink(missing_ok=True)
            raise


def _make_folder(folder: Path, flush: bool) -> None:
    missing = [folder]
    while not missing[-1].parent.is_dir():
        missing.append(missing[-1].parent)
    with contextlib.suppress(FileNotFoundError):  # removed again by others: whoever writes finds out
        for each in reversed(missing):
            each.mkdir(exist_ok=True)
            if flush:
                _flush_folder(each.parent)


def _flush_folder(folder: Path) -> None:
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return  # with all that was in it
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
