# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Messages of a queue in a file.

    {"format": "celeryops.queue", "version": 1, "id": ..., "queue": ...}   header, one line of JSON
    priority 0                                                             begins the messages of a priority step
    1010                                                                   bytes of the message that follows
    {"body": ...}                                                          the message byte for byte, and a newline
    {"count": 1, "messages": {"0": 1}, "sha256": ...}                      trailer, one line of JSON

The checksum is that of every byte in front of the trailer. A file may be compressed by gzip as a whole. Files are
written beside their place, synced, read back and only then put there.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import queue
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from .errors import PreconditionFailed, SaveFailed

FORMAT = "celeryops.queue"
VERSION = 1
_CHUNK = 1 << 20
_TAIL = 1 << 16


@dataclass(frozen=True)
class Saved:
    """What a complete and verified file says of itself."""

    header: dict[str, Any]
    count: int
    messages: dict[str, int]
    sha256: str


class Writer:
    """Writes one file. Hashing, compression and the disk run in a thread beside the reading of Redis."""

    def __init__(self, path: str, header: dict[str, Any], *, compress_level: int = 0, overwrite: bool = False) -> None:
        self.path = path
        self.partial = partial_path(path, str(header["id"]))
        self.header = {"format": FORMAT, "version": VERSION, **header}
        self.count = 0
        self.messages: dict[str, int] = {}
        self.bytes = 0
        self._step = ""
        self._overwrite = overwrite
        self._digest = hashlib.sha256()
        self._packer = zlib.compressobj(compress_level, zlib.DEFLATED, 31) if compress_level else None
        self._error: OSError | None = None
        self._queue: queue.Queue[bytes | None] = queue.Queue(8)
        with saving(path):
            descriptor = os.open(self.partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        self._file = os.fdopen(descriptor, "wb", buffering=0)
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()
        self._put(_line(self.header))

    def begin(self, step: int) -> None:
        self.messages[str(step)] = 0
        self._step = str(step)
        self._put(b"priority %d\n" % step)

    def add(self, messages: Sequence[bytes]) -> None:
        self.count += len(messages)
        self.messages[self._step] += len(messages)
        self._put(b"".join([b"%d\n%b\n" % (len(raw), raw) for raw in messages]))

    def finish(self) -> Saved:
        """Trailer, sync to the disk, and proof by reading the file back."""
        self._queue.put(None)
        self._thread.join()
        self._check()
        sha256 = self._digest.hexdigest()
        trailer = _line({"count": self.count, "messages": self.messages, "sha256": sha256})
        with saving(self.path):
            self._write(trailer)
            if self._packer is not None:
                self._write_all(self._packer.flush())
            os.fsync(self._file.fileno())
            self._file.close()
            saved = verify(self.partial)
        if saved.sha256 != sha256 or saved.count != self.count:
            raise SaveFailed(f"path: {self.path}: what was written reads back differently. Check the disk.")
        return saved

    def place(self) -> None:
        """Put the finished file in its place, atomically and for good."""
        with saving(self.path):
            if self._overwrite:
                os.replace(self.partial, self.path)
            else:
                os.link(self.partial, self.path)
                os.unlink(self.partial)
            descriptor = os.open(os.path.dirname(os.path.abspath(self.path)), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def discard(self) -> None:
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()
        with contextlib.suppress(OSError):
            self._file.close()
        remove_partial(self.partial)

    def _put(self, data: bytes) -> None:
        self._check()
        self._queue.put(data)

    def _check(self) -> None:
        if self._error is not None:
            raise save_failed(self.path, self._error) from self._error

    def _work(self) -> None:
        while True:
            data = self._queue.get()
            if data is None:
                return
            if self._error is not None:
                continue
            try:
                self._digest.update(data)
                self._write(data)
            except OSError as exc:
                self._error = exc

    def _write(self, data: bytes) -> None:
        self._write_all(self._packer.compress(data) if self._packer is not None else data)

    def _write_all(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            done = self._file.write(view)
            self.bytes += done
            view = view[done:]


def check_target(path: str, overwrite: bool) -> None:
    """Refuse a place where no file can be put, before anything is done."""
    directory = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(directory):
        raise PreconditionFailed(f"path: the directory {directory} does not exist on this host. Create it first.")
    if not os.access(directory, os.W_OK | os.X_OK):
        raise PreconditionFailed(f"path: {directory} is not writable for this user. Use become or another directory.")
    if os.path.isdir(path):
        raise PreconditionFailed(f"path: {path} is a directory. Give the name of a file.")
    if os.path.lexists(path) and not overwrite:
        raise PreconditionFailed(f"path: {path} exists. Give another name, or overwrite: true.")


def partial_path(path: str, identity: str) -> str:
    return f"{path}.{identity}.partial"


def remove_partial(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def save_failed(path: str, error: OSError) -> SaveFailed:
    return SaveFailed(f"path: cannot write {path}: {error.strerror or error}. Free space or give another place.")


@contextlib.contextmanager
def saving(path: str) -> Iterator[None]:
    try:
        yield
    except FileExistsError as exc:
        raise SaveFailed(f"path: {path} exists. Give another name, or overwrite: true.") from exc
    except OSError as exc:
        raise save_failed(path, exc) from exc


def verify(path: str) -> Saved:
    """Read the whole file: header, checksum and trailer must fit together."""
    with _reading(path) as handle:
        first = handle.readline(_CHUNK)
        header = _header(path, first)
        digest = hashlib.sha256(first)
        tail = b""
        while True:
            chunk = handle.read(_CHUNK)
            if not chunk:
                break
            tail += chunk
            if len(tail) > _TAIL:
                digest.update(memoryview(tail)[:-_TAIL])
                tail = tail[-_TAIL:]
    start = tail.rfind(b"\n", 0, len(tail) - 1) + 1
    digest.update(tail[:start])
    try:
        if not tail.endswith(b"\n"):
            raise ValueError("cut off")
        trailer = json.loads(tail[start:])
        saved = Saved(header, trailer["count"], dict(trailer["messages"]), trailer["sha256"])
    except (ValueError, KeyError, TypeError) as exc:
        raise PreconditionFailed(f"path: {path} is not complete: its trailer is missing or damaged.") from exc
    if saved.sha256 != digest.hexdigest():
        raise PreconditionFailed(f"path: {path} is damaged: its checksum does not fit its contents.")
    if saved.count != sum(saved.messages.values()):
        raise PreconditionFailed(f"path: {path} is damaged: its counts do not add up.")
    return saved


def read_header(path: str) -> dict[str, Any]:
    with _reading(path) as handle:
        return _header(path, handle.readline(_CHUNK))


def batches(path: str, size: Callable[[], int]) -> Iterator[tuple[int, list[bytes]]]:
    """The messages in the file's order, as (priority step, some messages)."""
    step = 0
    batch: list[bytes] = []
    with _reading(path) as handle:
        handle.readline(_CHUNK)
        while True:
            line = handle.readline(_CHUNK)
            if line.startswith(b"{") or not line:
                break
            if line.startswith(b"priority "):
                if batch:
                    yield step, batch
                step, batch = int(line[9:]), []
                continue
            length = int(line)
            raw = handle.read(length + 1)
            if len(raw) != length + 1 or raw[-1:] != b"\n":
                raise PreconditionFailed(f"path: {path} changed while it was read.")
            batch.append(raw[:-1])
            if len(batch) >= size():
                yield step, batch
                batch = []
    if batch:
        yield step, batch


def _header(path: str, line: bytes) -> dict[str, Any]:
    try:
        header = json.loads(line)
        if not isinstance(header, dict) or header.get("format") != FORMAT:
            raise ValueError("not ours")
    except ValueError as exc:
        raise PreconditionFailed(f"path: {path} is not a file that redis_queue has written.") from exc
    if header.get("version") != VERSION:
        raise PreconditionFailed(
            f"path: {path} is of format version {header.get('version')}; this collection reads version {VERSION}."
        )
    missing = [key for key in ("id", "queue", "db", "key_prefix", "operation") if key not in header]
    if missing:
        raise PreconditionFailed(f"path: {path}: its header lacks {', '.join(missing)}.")
    return header


@contextlib.contextmanager
def _reading(path: str) -> Iterator[BinaryIO]:
    try:
        with contextlib.ExitStack() as opened:
            handle: BinaryIO = opened.enter_context(open(path, "rb"))
            magic = handle.read(2)
            handle.seek(0)
            if magic == b"\x1f\x8b":
                handle = cast(BinaryIO, opened.enter_context(gzip.GzipFile(fileobj=handle)))
            yield handle
    except FileNotFoundError as exc:
        raise PreconditionFailed(f"path: there is no file {path} on this host.") from exc
    except (EOFError, zlib.error, gzip.BadGzipFile) as exc:
        raise PreconditionFailed(f"path: {path} is damaged or cut off: {exc}.") from exc
    except OSError as exc:
        raise PreconditionFailed(f"path: cannot read {path}: {exc.strerror or exc}.") from exc
    except ValueError as exc:
        raise PreconditionFailed(f"path: {path} is damaged: {exc}.") from exc


def _line(document: dict[str, Any]) -> bytes:
    return json.dumps(document).encode() + b"\n"
