# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Backups of a Redis on this host: made while it runs, verified, and put back.

A backup is one compressed tar: `dump.rdb`, the files of the append-only directory if that is what Redis loads, and
`backup.json` at the end with their checksums. It is written beside its place, synced, read back and only then put
there.

Needs the standard library and the tools of Redis only: the timer on the host of Redis runs this file by itself.
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

from .errors import AuthenticationFailed, CeleryOpsError, ConnectionFailed, PreconditionFailed, SaveFailed, WaitTimeout

FORMAT = "celeryops.redis"
VERSION = 1
NOTE = "backup.json"
DUMP = "dump.rdb"
SUFFIX = ".tar.gz"
_CHUNK = 1 << 20
_REFUSED = re.compile(r"(?:ERR|NOAUTH|WRONGPASS|NOPERM|LOADING|MISCONF|READONLY|OOM|MASTERDOWN|BUSY) ")
_DEFAULTS = {
    "dir": "/var/lib/redis",
    "dbfilename": "dump.rdb",
    "appendonly": "no",
    "appendfilename": "appendonly.aof",
    "appenddirname": "appendonlydir",
}


class Refused(CeleryOpsError):
    """Redis answered with an error; `word` is its first, such as LOADING."""

    category = "redis"

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.word = text.split()[0]


class Wedged(ConnectionFailed):
    """Redis took the connection and does not answer."""


@dataclass(frozen=True)
class Server:
    """A Redis on this host, or another one, asked with redis-cli. The password travels in the environment."""

    port: int = 6379
    password: str = field(default="", repr=False)
    timeout: float = 5.0
    host: str = "127.0.0.1"
    socket: str = ""  # asked there, where there is this file: a certificate that has ended shuts nobody out

    @property
    def _where(self) -> list[str]:
        there = bool(self.socket) and os.path.exists(self.socket)
        return ["-s", self.socket] if there else ["-h", self.host, "-p", str(self.port)]

    def ask(self, *command: str, timeout: float | None = None, hidden: bool = False) -> str:
        """The answer. `hidden`: the command is no argument of a process either."""
        environment = {**os.environ, "REDISCLI_AUTH": self.password} if self.password else dict(os.environ)
        if not self.password:
            environment.pop("REDISCLI_AUTH", None)
        seconds = timeout or self.timeout
        try:
            done = subprocess.run(
                ["redis-cli", *self._where, "--no-auth-warning", *(() if hidden else command)],
                capture_output=True, text=True, errors="replace", check=False,
                input=" ".join(command) + "\n" if hidden else "", timeout=seconds, env=environment,
            )  # fmt: skip
        except FileNotFoundError as exc:
            raise PreconditionFailed("redis-cli is missing on this host. Install redis-tools.") from exc
        except subprocess.TimeoutExpired as exc:
            raise Wedged(
                f"Redis on port {self.port} took the connection and did not answer in {seconds:g} s: it is stopped,"
                f" or busy with one long command."
            ) from exc
        text = done.stdout.strip()
        if "Could not connect" in done.stderr or "Could not connect" in text:
            raise ConnectionFailed(f"nothing listens on port {self.port} of this host: Redis is down.")
        if "max number of clients" in text + done.stderr:
            raise Refused("MAXCLIENTS " + (text or done.stderr.strip()))
        for said in (text, done.stderr.strip().removeprefix("AUTH failed: ")):
            if said.startswith(("NOAUTH", "WRONGPASS")):
                raise AuthenticationFailed(
                    f"Redis on port {self.port} refuses the password that it was asked with ({said.splitlines()[0]})."
                    f" Correct it in celeryops_broker_url."
                )
        if _REFUSED.match(text):
            raise Refused(text)
        if done.returncode or "Server closed the connection" in done.stderr:
            raise ConnectionFailed(f"redis-cli {command[0]}: {done.stderr.strip() or text or 'no answer'}")
        return text

    def info(self, *sections: str) -> dict[str, str]:
        return parse_info("\n".join(self.ask("INFO", section) for section in sections))

    def settings(self) -> dict[str, str]:
        """What it runs with, of what matters here."""
        found = dict(_DEFAULTS)
        for name in _DEFAULTS:
            lines = self.ask("CONFIG", "GET", name).splitlines()
            if len(lines) == 2:
                found[name] = lines[1]
        return found


def parse_info(text: str) -> dict[str, str]:
    pairs = (line.strip().partition(":") for line in text.splitlines() if ":" in line and not line.startswith("#"))
    return {key: value for key, _colon, value in pairs}


def read_settings(path: str) -> dict[str, str]:
    """The same from redis.conf and what it includes; what comes later wins. For a Redis that does not answer."""
    found = dict(_DEFAULTS)

    def read(name: str, depth: int) -> None:
        try:
            with open(name, encoding="utf-8", errors="replace") as lines:
                rows = lines.read().splitlines()
        except OSError as exc:
            raise PreconditionFailed(
                f"config: cannot read {name}: {exc.strerror}. Give the configuration of Redis."
            ) from exc
        for row in rows:
            with contextlib.suppress(ValueError):
                words = shlex.split(row, comments=row.lstrip().startswith("#"))
                if len(words) == 2 and words[0].lower() == "include" and depth < 10:
                    for one in sorted(glob.glob(words[1])):
                        read(one, depth + 1)
                elif len(words) == 2 and words[0].lower() in found:
                    found[words[0].lower()] = words[1]

    read(path, 0)
    return found


def loads_aof(settings: Mapping[str, str]) -> bool:
    """A Redis with an append-only file loads that at its start, and never the RDB."""
    return settings["appendonly"] == "yes"


def aof_files(settings: Mapping[str, str]) -> list[str]:
    """The files that make up the append-only file, relative to the data directory, manifest first."""
    folder, name = settings["appenddirname"], settings["appendfilename"]
    manifest = os.path.join(settings["dir"], folder, f"{name}.manifest")
    try:
        with open(manifest, encoding="utf-8") as lines:
            rows = [row.split() for row in lines if row.startswith("file ")]
    except FileNotFoundError:
        single = os.path.join(settings["dir"], name)
        return [name] if os.path.exists(single) else []
    # Type h is history: files that Redis is about to delete.
    parts = [row[1] for row in rows if len(row) >= 6 and row[5] != "h"]
    return [os.path.join(folder, one) for one in (f"{name}.manifest", *parts)]


@dataclass
class Backup:
    """What was made, or is found in a file."""

    path: str
    note: dict[str, Any]
    sha256: str = ""
    bytes: int = 0
    removed: list[str] = field(default_factory=list)
    seconds: float = 0.0


def check_directory(directory: str, needed: int) -> None:
    """Whether it can be made and written to; where it is missing, its nearest parent is judged."""
    place = os.path.abspath(directory)
    while not os.path.lexists(place):
        place = os.path.dirname(place)
    if not os.path.isdir(place):
        raise PreconditionFailed(f"directory: {place} is no directory. Give another one.")
    # Root may write where the mode says no, but not on a file system that is read only.
    if not os.access(place, os.W_OK | os.X_OK) or os.statvfs(place).f_flag & os.ST_RDONLY:
        raise PreconditionFailed(f"directory: {place} is not writable. Give another one.")
    free = shutil.disk_usage(place).free
    if free < needed:
        raise PreconditionFailed(
            f"directory: {directory} has {free // 2**20} MiB free and {-(-needed // 2**20)} MiB may be needed."
            f" Free space, or give another directory."
        )


def backups(directory: str, name: str) -> list[str]:
    """The backups of that name, the newest last: the time is in their name."""
    found = glob.glob(os.path.join(glob.escape(directory), f"{glob.escape(name)}-*{SUFFIX}"))
    form = re.compile(re.escape(name) + r"-\d{8}T\d{6}Z" + re.escape(SUFFIX))
    return sorted(path for path in found if form.fullmatch(os.path.basename(path)))


def surplus(directory: str, name: str, keep: int, fresh: int = 0) -> list[str]:
    """Which go when `keep` stay, `fresh` new ones counted."""
    found = backups(directory, name)
    return found[: max(0, len(found) + fresh - keep)]


def make(
    server: Server, directory: str, *, name: str = "redis", keep: int = 7, timeout: float = 3600.0, dry: bool = False
) -> Backup:
    """Write one, verify it, then remove the oldest beyond `keep`."""
    begun = time.monotonic()
    info = server.info("server", "persistence", "replication", "keyspace")
    if info.get("loading") == "1":
        raise PreconditionFailed(
            "Redis is still loading its data, so nothing whole can be saved yet. Run again when it is done."
        )
    settings = server.settings()
    files = aof_files(settings) if loads_aof(settings) else []
    dump = os.path.join(settings["dir"], settings["dbfilename"])
    sizes = [
        os.path.getsize(path)
        for path in (dump, *(os.path.join(settings["dir"], one) for one in files))
        if os.path.exists(path)
    ]
    check_directory(directory, sum(sizes))
    moment = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    path = os.path.join(directory, f"{name}-{moment}{SUFFIX}")
    if os.path.exists(path):
        raise PreconditionFailed(f"{path} exists: a backup was made this very second. Run again.")
    note: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "made": time.time(),
        "host": socket.gethostname(),
        "port": server.port,
        "redis": info["redis_version"],
        "run_id": info["run_id"],
        "role": info.get("role", ""),
        "source": "aof" if files else "rdb",
        "settings": {key: settings[key] for key in ("dbfilename", "appendfilename", "appenddirname")},
        "databases": {key: value for key, value in info.items() if re.fullmatch(r"db\d+", key)},
    }
    if dry:
        return Backup(path, note, removed=surplus(directory, name, keep, 1))
    os.makedirs(directory, 0o700, exist_ok=True)
    save(server, timeout)
    made = _write(path, note, settings, dump)
    made.removed = surplus(directory, name, keep)
    for old in made.removed:
        os.unlink(old)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(old + ".sha256")
    made.seconds = time.monotonic() - begun
    return made


def save(server: Server, timeout: float) -> None:
    """A snapshot that begins now, waited for and proven by Redis' own word."""
    end = time.monotonic() + timeout

    def wait(*fields: str) -> dict[str, str]:
        while True:
            state = server.info("persistence")
            if all(state.get(one, "0") == "0" for one in fields):
                return state
            if time.monotonic() > end:
                raise WaitTimeout(
                    f"Redis was not done with its snapshot in {timeout:g} s. Give timeout more, or look at its disk."
                )
            time.sleep(0.1)

    before = wait("rdb_bgsave_in_progress", "aof_rewrite_in_progress", "aof_rewrite_scheduled")
    # LASTSAVE counts seconds: one that ended within this second would hide ours.
    last = int(before["rdb_last_save_time"])
    while int(server.ask("TIME").split()[0]) <= last:
        time.sleep(0.1)
    server.ask("BGSAVE")
    after = wait("rdb_bgsave_in_progress")
    if after.get("rdb_last_bgsave_status") != "ok" or int(after["rdb_last_save_time"]) <= last:
        raise SaveFailed(
            "Redis could not write its snapshot (rdb_last_bgsave_status: "
            f"{after.get('rdb_last_bgsave_status')}). Its log says why: mostly a full disk, or no memory to fork"
            " (vm.overcommit_memory=1)."
        )


def check_rdb(path: str, shown: str = "") -> dict[str, int]:
    """Counts of a whole snapshot. Raises for one that is cut off, foreign, or of a newer Redis than this host has."""
    with _opened(path) as handle:
        magic = handle.read(9)
    shown = shown or path
    if not re.fullmatch(rb"REDIS\d{4}", magic):
        raise PreconditionFailed(f"file: {shown} is no snapshot of Redis: it does not begin with REDIS and a version.")
    done = _tool("redis-check-rdb", path)
    text = done.stdout + done.stderr
    if "Can't handle RDB format version" in text:
        raise PreconditionFailed(
            f"file: {shown} is of RDB version {int(magic[5:])}, written by a newer Redis than the {server_version()}"
            f" of this host. Restore it on a host with that Redis, or newer."
        )
    if done.returncode or "RDB looks OK" not in text:
        said = re.search(r"^\[offset \d+\] (?!Checking|AUX|Selecting)(.*)$", text, re.MULTILINE)
        reason = said.group(1) if said else text.strip()[-200:]
        raise PreconditionFailed(f"file: {shown} is damaged or cut off: redis-check-rdb says: {reason}.")
    counts = {
        key: int(number)
        for number, key in re.findall(r"^\[info\] (\d+) (keys read|expires|already expired)$", text, re.MULTILINE)
    }
    return {"keys": counts["keys read"], "expires": counts["expires"], "expired": counts["already expired"]}


def server_version() -> str:
    done = _tool("redis-server", "--version")
    found = re.search(r"v=(\S+)", done.stdout)
    if not found:
        raise PreconditionFailed(f"redis-server --version says {done.stdout.strip()!r}, which names no version.")
    return found.group(1)


def _tool(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False, stdin=subprocess.DEVNULL
        )
    except FileNotFoundError as exc:
        raise PreconditionFailed(
            f"{command[0]} is missing on this host. Install redis-tools and redis-server."
        ) from exc


class _Hashed(io.RawIOBase):
    """Reads so many bytes of a file and no more, though it grows, and knows their checksum."""

    def __init__(self, source: IO[bytes], size: int) -> None:
        self.source, self.left, self.digest = source, size, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self.source.read(self.left if size < 0 else min(size, self.left))
        self.left -= len(data)
        self.digest.update(data)
        return data


def _write(path: str, note: dict[str, Any], settings: Mapping[str, str], dump: str) -> Backup:
    partial = f"{path}.partial"
    try:
        with contextlib.ExitStack() as opened:
            members: dict[str, IO[bytes]] = {DUMP: opened.enter_context(open(dump, "rb"))}
            # The very file that is saved: Redis puts the next snapshot in its place under the same name.
            note["rdb"] = check_rdb(f"/proc/{os.getpid()}/fd/{members[DUMP].fileno()}", dump)
            if loads_aof(settings):
                members.update(_open_aof(opened, settings))
            note["files"] = {}
            descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            raw = opened.enter_context(os.fdopen(descriptor, "wb"))
            with tarfile.open(fileobj=raw, mode="w:gz", compresslevel=1) as tar:
                for member, handle in members.items():
                    entry = tarfile.TarInfo(member)
                    entry.size, entry.mode, entry.mtime = os.fstat(handle.fileno()).st_size, 0o600, int(note["made"])
                    source = _Hashed(handle, entry.size)
                    tar.addfile(entry, source)
                    note["files"][member] = {"bytes": entry.size, "sha256": source.digest.hexdigest()}
                text = json.dumps(note, indent=1).encode()
                entry = tarfile.TarInfo(NOTE)
                entry.size, entry.mode, entry.mtime = len(text), 0o600, int(note["made"])
                tar.addfile(entry, io.BytesIO(text))
            raw.flush()
            os.fsync(raw.fileno())
        if read(partial, path).note != note:
            raise SaveFailed(f"directory: {path}: what was written reads back differently. Check the disk.")
        digest = sha256(partial)
        size = os.path.getsize(partial)
        with open(path + ".sha256", "w", encoding="utf-8") as handle_text:
            handle_text.write(f"{digest}  {os.path.basename(path)}\n")
        os.replace(partial, path)
        folder = os.open(os.path.dirname(path), os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as exc:
        with contextlib.suppress(OSError):
            os.unlink(path + ".sha256")
        raise SaveFailed(
            f"directory: cannot write {path}: {exc.strerror or exc}. Free space or give another directory."
        ) from exc
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)
    return Backup(path, note, digest, size)


def _open_aof(opened: contextlib.ExitStack, settings: Mapping[str, str]) -> dict[str, IO[bytes]]:
    """All files of one state of the append-only directory: opened, they stay whole even if Redis rewrites meanwhile."""
    for _attempt in range(20):
        names = aof_files(settings)
        try:
            found: dict[str, IO[bytes]] = {}
            for name in names:
                found[name] = opened.enter_context(_raw(os.path.join(settings["dir"], name)))
        except FileNotFoundError:
            continue
        if aof_files(settings) == names:
            return found
    raise SaveFailed("Redis rewrites its append-only file again and again; no state of it could be copied. Run again.")


def _raw(path: str) -> IO[bytes]:
    return open(path, "rb")


def sha256(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while chunk := handle.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def _opened(path: str) -> Iterator[IO[bytes]]:
    try:
        with open(path, "rb") as handle:
            yield handle
    except OSError as exc:
        raise PreconditionFailed(
            f"file: cannot read {path}: {exc.strerror}. Give a backup that is on this host."
        ) from exc


def is_archive(path: str) -> bool:
    with _opened(path) as handle:
        return handle.read(2) == b"\x1f\x8b"


def read(path: str, shown: str = "", into: str | None = None) -> Backup:
    """What a backup says of itself, every byte of it compared with its checksums; with `into` unpacked there."""
    shown = shown or path
    seen: dict[str, dict[str, Any]] = {}
    note: dict[str, Any] | None = None
    try:
        with _opened(path) as raw, tarfile.open(fileobj=raw, mode="r|gz") as tar:
            for entry in tar:
                source = tar.extractfile(entry)
                if source is None or entry.name.startswith("/") or ".." in entry.name.split("/") or not entry.isreg():
                    raise PreconditionFailed(f"file: {shown} holds {entry.name!r}, which no backup does.")
                if entry.name == NOTE:
                    note = json.loads(source.read())
                    continue
                digest, size = hashlib.sha256(), 0
                with contextlib.ExitStack() as opened:
                    target = None
                    if into is not None:
                        place = os.path.join(into, entry.name)
                        os.makedirs(os.path.dirname(place), mode=0o700, exist_ok=True)
                        target = opened.enter_context(open(place, "wb"))
                    while chunk := source.read(_CHUNK):
                        digest.update(chunk)
                        size += len(chunk)
                        if target:
                            target.write(chunk)
                    if target:
                        target.flush()
                        os.fsync(target.fileno())
                seen[entry.name] = {"bytes": size, "sha256": digest.hexdigest()}
    except (tarfile.TarError, EOFError, zlib.error, ValueError) as exc:
        raise PreconditionFailed(f"file: {shown} is damaged or cut off: {exc}.") from exc
    if note is None or not isinstance(note, dict) or note.get("format") != FORMAT:
        raise PreconditionFailed(f"file: {shown} is no backup of redis_backup, or is cut off: it has no {NOTE}.")
    if note.get("version") != VERSION:
        raise PreconditionFailed(f"file: {shown} is of format {note.get('version')}; this collection reads {VERSION}.")
    if note.get("files") != seen:
        raise PreconditionFailed(f"file: {shown} is damaged: its contents do not fit their checksums.")
    return Backup(path, note)


def main(arguments: Sequence[str] | None = None) -> int:
    """For the timer. The password is in REDISCLI_AUTH."""
    parser = argparse.ArgumentParser(description="Back up the Redis of this host.")
    parser.add_argument("--port", type=int, default=6379)
    parser.add_argument("--socket", default="")
    parser.add_argument("--directory", required=True)
    parser.add_argument("--name", default="redis")
    parser.add_argument("--keep", type=int, default=7)
    parser.add_argument("--timeout", type=float, default=3600.0)
    given = parser.parse_args(arguments)
    server = Server(given.port, os.environ.get("REDISCLI_AUTH", ""), socket=given.socket)
    try:
        made = make(server, given.directory, name=given.name, keep=given.keep, timeout=given.timeout)
    except CeleryOpsError as exc:
        sys.stderr.write(f"{exc.msg}\n")
        return 1
    sys.stdout.write(f"{made.path}: {made.note['rdb']['keys']} keys, {made.bytes} bytes; removed {len(made.removed)}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
