# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a restored Redis would do again. No worker runs meanwhile.

`note` is called before the restore: it keeps the ids of all that waits, and a copy of it. `settle` is called after it.
A message that is in the backup and was not there just before the restore had been taken by a worker, or removed: run
again, it is done twice. One that was there and is not in the backup came later: it is put back. Dead letters are a
matter of their own: a task that failed since is in the backup as a message and was there as a dead letter.

A note has a token, which lies in Redis too. A Redis that has another one was given other data and was not settled:
then what that note knows is still wanted.
"""

from __future__ import annotations

import gzip
import json
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

from . import deadletters, savefile
from .control import Control
from .errors import BadMessage, PreconditionFailed
from .message import Envelope
from .queues import RedisQueues, Selection
from .rescue import ask, rescue

PARKED = "restored."
NOTED = "celeryops:restoring"
SHOWN = 1000


@dataclass
class Replay:
    """What was, or would be, done with the messages of a restored Redis."""

    queues: dict[str, int] = field(default_factory=dict)  # restored messages by queue, those given back included
    parked: dict[str, int] = field(default_factory=dict)
    expired: list[str] = field(default_factory=list)
    repeated: list[str] | None = None  # None: not known what was done since the backup
    later: list[str] = field(default_factory=list)  # came after the backup, and back
    given_back: int = 0
    unreadable: int = 0
    locks: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)


def write_note(path: str, found: dict[str, Any]) -> None:
    partial = f"{path}.partial"
    with savefile.saving(path):
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as raw, gzip.GzipFile(fileobj=raw, mode="wb", compresslevel=1) as handle:
            handle.write(json.dumps(found).encode())
        os.replace(partial, path)


def read_note(path: str) -> dict[str, Any]:
    try:
        with gzip.open(path, "rb") as handle:
            found = json.load(handle)
    except (OSError, EOFError, ValueError) as exc:
        raise PreconditionFailed(f"path: {path} is not what state noted has written: {exc}.") from exc
    return dict(found)


def demand_idle(queues: RedisQueues, control: Control) -> None:
    """No worker may take a restored message before it has been judged."""
    found = ask(queues, control, [])
    if found.answered or found.silent:
        names = ", ".join(found.answered) or f"{found.silent} that do not answer"
        raise PreconditionFailed(f"workers are connected: {names}. Stop every worker of this broker first.")


def note(
    queues: RedisQueues, control: Control, path: str, directory: str, moment: str, *, dry: bool = False
) -> dict[str, Any]:
    """Ids of all messages by queue, and a copy of those that wait."""
    savefile.check_target(path, True)
    if dry:
        waiting = {queue: sum(1 for _id in queues.ids(queue)) for queue in queues.queues()}
        return {"waiting": waiting, "held": sum(1 for _id in queues.unacked_ids()), "files": {}}
    demand_idle(queues, control)
    rescue(queues, control)  # what a dead worker held waits from now on, and is copied
    held, late, now = list(queues.unacked_ids()), [], queues.now()
    saved: dict[str, dict[str, list[str]]] = {}
    for queue in queues.queues():
        if next(iter(queues.ids(queue)), None) is not None:
            target = os.path.join(directory, f"{queue}-before-restore-{moment}.queue.gz")
            queues.export(queue, target, compress_level=1)
            ids = saved.setdefault(queue, {}).setdefault(target, [])
            # Those of the file: a producer goes on.
            for _step, batch in savefile.batches(target, lambda: 1000):
                for one in filter(None, _read(batch)):
                    ids.append(one.id)
                    late += [one.id] if expired(one, now) else []
    told = {
        "waiting": {queue: len(ids) for queue, found in saved.items() for ids in found.values()},
        "held": len(held),
        "files": {queue: target for queue, found in saved.items() for target in found},
    }
    key, token = queues.key_prefix + NOTED, uuid.uuid4().hex
    earlier = read_note(path) if os.path.exists(path) else None
    if earlier and earlier["token"].encode() != queues.client.get(key):
        for queue, older in earlier["saved"].items():
            saved[queue] = {**older, **saved.get(queue, {})}
        late += earlier["expired"]
        held += earlier["held"]
    queues.client.set(key, token)
    write_note(path, {"token": token, "saved": saved, "held": held, "expired": late})
    return told


def expired(envelope: Envelope, now: float) -> bool:
    """Whether a worker would refuse it as too late."""
    value = envelope.expires
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value) <= now
    if isinstance(value, str) and value:
        try:
            moment = datetime.fromisoformat(value.replace("Z", "+00:00"))
        except ValueError:
            return False
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=timezone.utc)
        return moment.timestamp() <= now
    return False


def settle(
    queues: RedisQueues,
    control: Control,
    *,
    before: dict[str, Any] | None,
    since: float,
    directory: str,
    moment: str,
    mutex: str = "unacked_mutex",
    park: bool = True,
    drop_expired: bool = True,
) -> Replay:
    """`since`: when the restored Redis began; what was published later is not of the backup and stays."""
    result = Replay()
    result.locks = sorted(_locks(queues, mutex))
    if result.locks:
        queues.client.delete(*result.locks)
    returned = rescue(queues, control)
    if returned.unknown:
        raise PreconditionFailed(
            f"{returned.unknown} restored messages may be held by workers that are connected and do not answer"
            f" ({', '.join(returned.suspects) or 'no name known'}). Stop every worker of this broker, then run again."
        )
    result.given_back = returned.count
    now = queues.now()
    # By whether they are dead letters.
    known: dict[bool, set[str]] = {False: set(before["held"] if before else ()), True: set()}
    restored: dict[bool, set[str]] = {False: set(), True: set()}
    for queue, saved in before["saved"].items() if before else ():
        known[queue.endswith(deadletters.SUFFIX)].update(*saved.values())
    repeated: list[str] = []
    for queue in queues.queues():
        dead = queue.endswith(deadletters.SUFFIX)
        if queue.startswith(PARKED):
            restored[dead].update(queues.ids(queue))  # an earlier run was interrupted
            continue
        fresh, old, late, unreadable = 0, [], [], 0
        for envelope in _read(queues.messages(queue)):
            if envelope is None:
                unreadable += 1
            elif dead and deadletters.HEADER in envelope.document["headers"]:
                restored[dead].add(envelope.id)  # nobody consumes it
            elif envelope.published is not None and envelope.published >= since:
                fresh += 1
            elif drop_expired and expired(envelope, now):
                late.append(envelope.id)
            else:
                old.append(envelope.id)
        restored[dead].update(old, late)
        result.unreadable += unreadable
        result.queues[queue] = len(old) + len(late)
        repeated += [one for one in old if one not in known[dead]]
        if late:
            path = os.path.join(directory, f"{queue}-expired-{moment}.queue.gz")
            queues.drop(queue, Selection(ids=frozenset(late)), path, compress_level=1)
            result.expired += late
            result.files.append(path)
        if park and old:
            selection = Selection(ids=frozenset(old)) if fresh else None
            result.parked[queue] = queues.move(queue, PARKED + queue, selection).count
    result.queues = {queue: count for queue, count in result.queues.items() if count}
    if before is not None:
        result.repeated = repeated
        for queue, saved in before["saved"].items():
            there = restored[queue.endswith(deadletters.SUFFIX)]
            there.update(before["expired"])
            for path, ids in saved.items():
                later = frozenset(ids) - there
                if later and queues.import_(path, queue, selection=Selection(ids=later), accept=("copy",)).count:
                    result.later += sorted(later)
                there |= later
    return result


def _locks(queues: RedisQueues, mutex: str) -> Iterator[str]:
    """Locks of processes that are not there any more."""
    for pattern in (f"{queues.key_prefix}celeryops:lock:*", f"{queues.key_prefix}celeryops:queue:*:lock"):
        for raw in queues.client.scan_iter(match=pattern, count=1000, _type="string"):
            yield raw.decode("utf-8", "replace")
    if queues.client.exists(queues.key_prefix + mutex):
        yield queues.key_prefix + mutex


def _read(messages: Iterable[bytes]) -> Iterator[Envelope | None]:
    for raw in messages:
        try:
            yield Envelope.parse(raw)
        except BadMessage:
            yield None


def listed(ids: list[str], path: str, write: Callable[[str, str], None]) -> dict[str, Any]:
    """Some ids, and all of them in a file where they are many."""
    found: dict[str, Any] = {"count": len(ids), "ids": ids[:SHOWN]}
    if len(ids) > SHOWN:
        write(path, "\n".join([*ids, ""]))
        found["file"] = path
    return found


def stamp() -> str:
    return time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
