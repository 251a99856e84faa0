# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Who is connected to Redis, as far as CLIENT LIST tells, and closing what nobody uses.

A connection is closed by its id, after a second look, and never if it waits in a blocking pop, subscribes,
replicates, is inside a transaction, or is ours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ROLES = ("worker", "subscriber", "producer", "exporter", "operator", "replication", "unused", "other")
_NUMBERS = ("id", "age", "idle", "db", "sub", "psub", "ssub", "multi", "tot-mem")
_POPS = ("brpop", "blpop", "bzmpop", "blmpop", "blmove", "brpoplpush", "bzpopmin", "bzpopmax", "xreadgroup", "xread")
_SENDS = ("lpush", "rpush", "publish", "evalsha", "eval", "exec", "sadd", "smembers")
_WATCHES = ("info", "slowlog", "latency", "config|get", "dbsize", "llen", "memory|usage")
_MINE = ("client", "monitor", "debug", "config|set", "keys")
PAGE = 200


@dataclass(frozen=True)
class Client:
    id: int
    address: str
    name: str
    user: str
    age: int
    idle: int
    db: int
    flags: str
    command: str
    resp: str
    subscriptions: int
    multi: int
    memory: int
    role: str = "other"

    @property
    def host(self) -> str:
        return self.address.rpartition(":")[0]

    @property
    def kept(self) -> str:
        """Why it must not be closed, empty where it may."""
        if self.flags.strip("N") and set(self.flags) & set("SMO"):
            return "replication or monitor"
        if "b" in self.flags or self.command in _POPS:
            return "waits in a blocking pop"
        if self.subscriptions or "P" in self.flags:
            return "subscribes"
        if "x" in self.flags or self.multi >= 0:
            return "inside a transaction"
        return ""


def parse(rows: Iterable[Mapping[str, Any]], mine: int = 0) -> list[Client]:
    """The rows of CLIENT LIST with the role of each."""
    plain = [_client(row) for row in rows]
    # Who pops on a host has its other connections there too: remote control, events, acknowledgements.
    workers = {client.host for client in plain if client.command in _POPS}
    return [Client(**{**client.__dict__, "role": _role(client, workers, mine)}) for client in plain]


def _client(row: Mapping[str, Any]) -> Client:
    number = {key: int(row.get(key) or 0) for key in _NUMBERS}
    return Client(
        id=number["id"],
        address=str(row.get("addr") or ""),
        name=str(row.get("name") or ""),
        user=str(row.get("user") or ""),
        age=number["age"],
        idle=number["idle"],
        db=number["db"],
        flags=str(row.get("flags") or "N"),
        command=str(row.get("cmd") or "").lower(),
        resp=str(row.get("resp") or "2"),
        subscriptions=number["sub"] + number["psub"] + number["ssub"],
        multi=int(row.get("multi", -1)),
        memory=number["tot-mem"],
    )


def _role(client: Client, workers: set[str], mine: int) -> str:
    command, first = client.command, client.command.partition("|")[0]
    if client.id == mine:
        return "operator"
    if set(client.flags) & set("SM"):
        return "replication"
    if "exporter" in client.name:
        return "exporter"
    if command in _POPS:
        return "worker"
    if client.subscriptions:
        return "worker" if client.host in workers else "subscriber"
    if command in ("", "null", "auth", "hello", "select", "ping") or (first == "client" and command != "client|list"):
        # It said who it is and nothing since.
        return "unused"
    if command in _WATCHES:
        return "exporter"
    if command in _MINE or first in _MINE:
        return "operator"
    if client.host in workers:
        return "worker"
    return "producer" if command in _SENDS else "other"


def describe(client: Client) -> dict[str, Any]:
    return {
        "id": client.id,
        "role": client.role,
        "address": client.address,
        "name": client.name,
        "user": client.user,
        "age": client.age,
        "idle": client.idle,
        "command": client.command,
        "resp": client.resp,
        "subscriptions": client.subscriptions,
        "kept": client.kept,
    }


def limit(redis: Any) -> int | None:
    """maxclients, where the user may ask for it."""
    try:
        return int(redis.config_get("maxclients")["maxclients"])
    except Exception as exc:  # redis is imported by the caller only
        if "NoPermission" in type(exc).__name__ or "unknown command" in str(exc):
            return None
        raise


def listed(redis: Any, ids: Sequence[int] = ()) -> list[Client]:
    rows = redis.client_list(client_id=list(ids)) if ids else redis.client_list()
    return parse(rows, int(redis.client_id()))


def summary(found: Sequence[Client]) -> dict[str, Any]:
    """By role and by host of the client."""
    roles = {
        role: {
            "count": len(some),
            "oldest_idle": max(client.idle for client in some),
            "bytes": sum(client.memory for client in some),
        }
        for role in ROLES
        if (some := [client for client in found if client.role == role])
    }
    return {
        "count": len(found),
        "roles": roles,
        "hosts": dict(Counter(client.host for client in found).most_common(50)),
    }


def closable(
    found: Iterable[Client], idle: float, *, roles: Sequence[str] = (), hosts: Sequence[str] = (), mine: int = 0
) -> list[Client]:
    return [
        client
        for client in found
        if client.idle >= idle
        and not client.kept
        and client.id != mine
        and (not roles or client.role in roles)
        and (not hosts or client.host in hosts)
    ]


def close(
    redis: Any, idle: float, *, roles: Sequence[str] = (), hosts: Sequence[str] = (), dry: bool = False
) -> tuple[list[Client], list[Client]]:
    """(all that were connected, those that were closed), each looked at again just before."""
    mine = int(redis.client_id())
    found = listed(redis)
    chosen = closable(found, idle, roles=roles, hosts=hosts, mine=mine)
    if dry:
        return found, chosen
    closed: list[Client] = []
    for start in range(0, len(chosen), PAGE):
        part = {client.id: client for client in chosen[start : start + PAGE]}
        # Roles depend on the whole list; what may have changed is only whether it is used.
        still = [one.id for one in closable(parse(redis.client_list(client_id=list(part))), idle, mine=mine)]
        pipe = redis.pipeline(transaction=False)
        for number in still:
            pipe.client_kill_filter(_id=str(number))
        closed += [part[number] for number, done in zip(still, pipe.execute()) if done]
    return found, closed
