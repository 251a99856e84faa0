# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Setting up replicas and Sentinels on their own hosts. Who leads is asked, the inventory only begins it.

Redis and Sentinel rewrite their configuration at a failover. Nothing here writes over what they know.
"""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .backup import Refused, Server
from .errors import ConnectionFailed, PreconditionFailed, WaitTimeout

# What lines of its file a Sentinel reads at its start only; where it leaves one out it has this.
FIXED = {"port": "26379", "bind": "* -::*", "protected-mode": "no", "requirepass": ""}


def resolve(address: str) -> str:
    """HOST:PORT with the number of the host, as Sentinels name it."""
    host, _colon, port = address.rpartition(":")
    try:
        return f"{socket.getaddrinfo(host, int(port), socket.AF_UNSPEC, socket.SOCK_STREAM)[0][4][0]}:{port}"
    except (OSError, ValueError) as exc:
        raise PreconditionFailed(f"{address}: is no address of a Redis that this host can resolve: {exc}.") from exc


@dataclass(frozen=True)
class Group:
    """The servers of one broker. Addresses are HOST:PORT, resolved."""

    peers: Sequence[str]
    first: str  # leads as long as nobody else does
    sentinels: Sequence[str]
    name: str
    password: str = field(default="", repr=False)
    sentinel_password: str = field(default="", repr=False)
    patience: float = 3.0

    def server(self, address: str) -> Server:
        host, _colon, port = address.rpartition(":")
        return Server(int(port), self.password, self.patience, host)

    def sentinel(self, address: str) -> Server:
        host, _colon, port = address.rpartition(":")
        return Server(int(port), self.sentinel_password, self.patience, host)

    def named(self) -> str:
        """The primary that the Sentinels know, empty where none of them knows one."""
        found: dict[str, int] = {}
        for address in self.sentinels:
            try:
                told = self.sentinel(address).ask("SENTINEL", "MASTER", self.name).splitlines()
            except (ConnectionFailed, Refused):
                continue
            values = dict(zip(told[::2], told[1::2], strict=False))
            if values.get("ip"):
                found[f"{values['ip']}:{values['port']}"] = int(values.get("config-epoch", 0))
        return max(found, key=lambda address: found[address]) if found else ""

    def leading(self) -> list[str]:
        """Those that are a primary with replicas."""
        found = []
        for address in self.peers:
            try:
                info = self.server(address).info("replication")
            except (ConnectionFailed, Refused):
                continue
            if info.get("role") == "master" and info.get("connected_slaves", "0") != "0":
                found.append(address)
        return found

    def leader(self) -> str:
        """Who is the primary now."""
        told = self.named()
        if told:
            return told
        found = self.leading()
        if len(found) > 1:
            raise PreconditionFailed(
                f"{' and '.join(found)} are both primaries with replicas, and no Sentinel says which one counts. Make"
                f" one a replica of the other, with REPLICAOF, once you know which data counts."
            )
        return found[0] if found else self.first


def attach(server: Server, group: Group, me: str, *, discard: bool, timeout: float, dry: bool) -> dict[str, Any]:
    """Make this Redis a replica of who leads, unless it leads itself or is one already."""
    info = server.info("replication", "keyspace")
    if info.get("role") == "slave":
        source = resolve(f"{info['master_host']}:{info['master_port']}")
        if source not in group.peers:
            raise PreconditionFailed(
                f"this Redis is a replica of {source}, which is not one of {', '.join(group.peers)}. Add that host to"
                f" the group of Redis, or run REPLICAOF NO ONE here."
            )
        return {"changed": False, "role": "replica", "primary": source, "discarded": 0}
    leader = group.leader()
    if leader == me:
        return {"changed": False, "role": "primary", "primary": me, "discarded": 0}
    keys = sum(int(found) for value in info.values() for found in re.findall(r"^keys=(\d+)", value))
    if keys and not discard:
        raise PreconditionFailed(
            f"this Redis holds {keys} keys, which are lost when it becomes a replica of {leader}. Move them there"
            f" first (queue_purge saves, queue_restore puts back), or let them go with celeryops_confirm, the name of"
            f" this host: a backup is made before."
        )
    if not dry:
        if group.server(leader).info("replication").get("role") != "master":
            raise PreconditionFailed(f"{leader} is no primary at the moment. A failover may be under way: run again.")
        host, _colon, port = leader.rpartition(":")
        server.ask("REPLICAOF", host, port)
        server.ask("CONFIG", "REWRITE")
        linked(server, leader, timeout)
    return {"changed": True, "role": "replica", "primary": leader, "discarded": keys}


def linked(server: Server, leader: str, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while True:
        try:
            info = server.info("replication")
        except Refused as exc:  # it is loading what it was sent
            info = {"master_link_status": exc.word}
        if info.get("master_link_status") == "up":
            return
        if time.monotonic() > deadline:
            raise WaitTimeout(
                f"the link to {leader} is {info.get('master_link_status')} after {timeout:g} s. Look at the logs of"
                f" both: the password of the primary, its bind address, or a firewall."
            )
        time.sleep(0.2)


@dataclass(frozen=True)
class Standing:
    """What a Redis that answers is to others."""

    source: str  # whose replica it is, empty for a primary
    replicas: Sequence[str]
    watchers: int  # Sentinels


def standing(server: Server) -> Standing:
    info = server.info("replication")
    followers = (info.get(f"slave{number}", "") for number in range(int(info.get("connected_slaves", "0"))))
    told = [dict(word.partition("=")[::2] for word in row.split(",")) for row in followers if row]
    # Each Sentinel has one subscription to each Redis that it watches.
    watchers = server.ask("PUBSUB", "NUMSUB", "__sentinel__:hello").splitlines()[-1:]
    return Standing(
        f"{info['master_host']}:{info['master_port']}" if info.get("role") == "slave" else "",
        [f"{one['ip']}:{one['port']}" for one in told],
        int(watchers[0]) if watchers and watchers[0].isdigit() else 0,
    )


def may_restore(server: Server, group: Group, me: str, *, stopped: bool) -> None:
    """Refuse where what is restored would be overwritten by another Redis.

    `stopped`: the Sentinels of the group are to be at rest by now; before that they may watch.
    """
    led = group.named()
    if led and led != me:
        raise PreconditionFailed(
            f"the Sentinels name {led} as the primary, which would overwrite what is restored here. Restore it there:"
            f" celeryops_redis_host."
        )
    try:
        found = standing(server)
    except (ConnectionFailed, Refused):
        return  # it is down, and no Sentinel has replaced it
    if found.source:
        raise PreconditionFailed(
            f"this Redis is a replica of {found.source}, which would overwrite what is restored here. Restore it there:"
            f" celeryops_redis_host."
        )
    if found.watchers > (0 if stopped else len(group.sentinels)):
        raise PreconditionFailed(
            f"{found.watchers} Sentinels watch this Redis and would promote a replica with the old data meanwhile."
            f" The {len(group.sentinels)} of celeryops_sentinel_group are stopped for that time; stop the others"
            f" (systemctl stop redis-sentinel), or put their hosts into the group."
        )


def may_flush(server: Server) -> None:
    """Refuse where the keys of other hosts would go too, or are those of another."""
    found = standing(server)
    if found.source:
        raise PreconditionFailed(
            f"this Redis is a replica of {found.source} and cannot be emptied by itself. Name the host of the primary:"
            f" celeryops_redis_host."
        )
    if found.replicas:
        raise PreconditionFailed(
            f"{', '.join(found.replicas)} replicate this Redis and would lose their keys too; nobody has named them."
            f" Stop Redis there first, or let it go its own way with REPLICAOF NO ONE."
        )


def hand(server: Server, user: str, password: str, *, dry: bool) -> list[str]:
    """What this Redis gives to its primary, now or after a failover; it keeps that itself. Names of what was otherwise.

    The link that it has stays as it is.
    """
    wanted = {"masteruser": user, "masterauth": password}
    differ = [name for name, value in wanted.items() if _setting(server, name) != value]
    if differ and not dry:
        for name in differ:
            server.ask("CONFIG", "SET", name, quoted(wanted[name]), hidden=True)
        server.ask("CONFIG", "REWRITE")
    return differ


def _setting(server: Server, name: str) -> str:
    return "\n".join(server.ask("CONFIG", "GET", name).splitlines()[1:])


@dataclass(frozen=True)
class Sentinel:
    """What one Sentinel is to watch, how, and whom it connects to Redis as."""

    port: int
    bind: Sequence[str]
    quorum: int
    down_after: int  # milliseconds
    failover_timeout: int  # milliseconds
    directory: str
    user: str = ""
    password: str = field(default="", repr=False)

    def fixed(self, group: Group) -> dict[str, str]:
        found = {"port": str(self.port), "bind": " ".join(self.bind), "protected-mode": "no"}
        if group.sentinel_password:
            found |= {"protected-mode": "yes", "requirepass": quoted(group.sentinel_password)}
        return found

    def settings(self) -> dict[str, str]:
        """Option of SENTINEL SET -> value, as SENTINEL MASTER tells them, but for the quorum."""
        return {
            "down-after-milliseconds": str(self.down_after),
            "failover-timeout": str(self.failover_timeout),
            "quorum": str(self.quorum),
        }

    def begin(self, group: Group, leader: str) -> str:
        """The file that it starts with, and owns from then on."""
        host, _colon, port = leader.rpartition(":")
        lines = [f"{name} {value}" for name, value in self.fixed(group).items()]
        lines += [f"dir {self.directory}", f"sentinel monitor {group.name} {host} {port} {self.quorum}"]
        if self.user:
            lines.append(f"sentinel auth-user {group.name} {self.user}")
        if self.password:
            lines.append(f"sentinel auth-pass {group.name} {quoted(self.password)}")
        lines.append(f"sentinel down-after-milliseconds {group.name} {self.down_after}")
        lines.append(f"sentinel failover-timeout {group.name} {self.failover_timeout}")
        return "\n".join([*lines, f"sentinel parallel-syncs {group.name} 1", ""])


def quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def watches(text: str, name: str) -> bool:
    """Whether this file of a Sentinel has our primary."""
    return re.search(rf"^sentinel monitor {re.escape(name)} ", text, re.MULTILINE) is not None


def line_of(text: str, start: str) -> str:
    """What follows in the last line that starts so, without quotes of its own."""
    found = re.findall(rf"^{re.escape(start)} +(.*?)\s*$", text, re.MULTILINE)
    return unquoted(found[-1]) if found else ""


def unquoted(value: str) -> str:
    if len(value) > 1 and value[0] == value[-1] == '"':
        return re.sub(r"\\(.)", r"\1", value[1:-1])
    return value


def refit(text: str, wanted: Mapping[str, str]) -> str:
    """The file with other lines of what is read at the start only; what Sentinel has learnt stays."""
    # A line `user default`, which Sentinel adds, would win over requirepass.
    kept = [line for line in text.splitlines() if line.split(" ", 1)[0] not in (*FIXED, "user")]
    return "\n".join([*(f"{name} {value}" for name, value in wanted.items()), *kept, ""])


def misfits(text: str, wanted: Mapping[str, str]) -> list[str]:
    """Names of what is read at the start only and is otherwise in the file."""
    return [
        name for name, usual in FIXED.items() if (line_of(text, name) or usual) != unquoted(wanted.get(name, usual))
    ]


def differing(server: Server, text: str, wanted: Sentinel, group: Group) -> dict[str, str]:
    """What a running Sentinel has otherwise: option of SENTINEL SET -> value wanted."""
    told = server.ask("SENTINEL", "MASTER", group.name).splitlines()
    now = dict(zip(told[::2], told[1::2], strict=False))
    found = {name: value for name, value in wanted.settings().items() if now.get(name) != value}
    for name, value in (("auth-user", wanted.user), ("auth-pass", wanted.password)):
        if line_of(text, f"sentinel {name} {group.name}") != value:
            found[name] = value
    return found
