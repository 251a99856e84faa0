# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Users of Redis: what each role may do, and the steps from the users there are to those wanted.

The commands were found by running workers, beat, producers and the modules under ACL LOG with Celery 5.4 to 5.7.
Needs the standard library only: the module runs on the host of Redis.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from .errors import PreconditionFailed

ADMINISTRATOR = "default"
ROLES = ("worker", "beat", "producer", "exporter", "operator", "replica", "sentinel", "other")
STEPS = ("prepare", "finish")
NO_PASSWORD = "nopass"
LEAST = 12  # characters of a password

_CONNECTION = "ping echo client|setname client|getname client|id"
_TRANSACTION = "multi exec discard watch unwatch"
_SUBSCRIBE = "subscribe psubscribe unsubscribe punsubscribe"
_SCRIPT = "eval evalsha script|load script|exists"
_RESULTS = f"{_TRANSACTION} {_SUBSCRIBE} " + (
    "get mget set setex del expire exists publish incr lrange llen rpush zadd zrange zcount"
)
_BIND = f"{_SCRIPT} sadd smembers zadd exists time"
_WORK = (
    f"{_CONNECTION} {_TRANSACTION} {_SUBSCRIBE} {_SCRIPT}"
    " brpop rpop lpush rpush lpop llen lindex lrange ltrim lrem zadd zrem zrange zrevrange zrangebyscore"
    " zrevrangebyscore zscore zcard zcount zremrangebyscore hset hget hdel hexists hmget hgetall hincrby hlen hscan"
    " sadd srem smembers sismember scard get mget set setex getset del unlink incr incrby decr exists expire pexpire"
    " expireat ttl pttl type publish time"
)
COMMANDS: Mapping[str, str] = {
    "worker": _WORK,
    "beat": (
        f"{_CONNECTION} {_TRANSACTION} {_SUBSCRIBE} {_BIND}"
        " lpush publish srem del rpush brpop llen hset hget hdel hexists hgetall get set expire pexpire zrem"
        " zrangebyscore"
    ),
    # Into queues it pushes and does nothing else with them: the rest has keys of its own, see rules().
    "producer": f"{_CONNECTION} {_TRANSACTION} lpush publish",
    "exporter": (
        f"{_CONNECTION} {_TRANSACTION} {_SUBSCRIBE} {_BIND}"
        " srem zrem zrangebyscore brpop del info dbsize llen zcard hlen scard strlen type memory|stats latency|latest"
        " latency|histogram slowlog|len client|list"
    ),
    "operator": (
        f"{_WORK} scan sscan zscan blmpop lmpop rename renamenx rpoplpush lmove lset linsert object|idletime"
        " object|encoding memory|usage info dbsize config|get client|list client|kill pubsub|numsub pubsub|channels"
        " strlen touch persist"
    ),
    "replica": "ping psync replconf",
    "sentinel": (
        "ping info client|setname client|kill subscribe publish multi exec slaveof replicaof config|rewrite script|kill"
    ),
    "other": _CONNECTION,
}
# What a failover sends in the operator's name: writes are paused, the old primary becomes a replica. Which of several
# replicas is wanted the Sentinels learn by its priority.
_FAILOVER = "client|pause client|unpause replicaof config|rewrite"
_CHOICE = "config|set"
_RESULT_KEYS = ("celery-task-meta-", "celery-taskset-meta-", "chord-unlock-")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_RULE = re.compile(r"(?:[+-]@?[a-z][a-z0-9|_.-]*|allkeys|allcommands|allchannels|%(?:R|W|RW)?~\S+|[~&]\S+)")
_HASH = re.compile(r"[0-9a-f]{64}")


def digest(password: str) -> str:
    return hashlib.sha256(password.encode()).hexdigest()


def literal(text: str) -> str:
    """A key as a pattern that fits nothing else."""
    return re.sub(r"([*?\[\]\\])", r"\\\1", text)


@dataclass(frozen=True)
class Layout:
    """Where the application's keys lie."""

    prefix: str = ""
    queues: tuple[str, ...] = ()
    sep: str = "\x06\x16"
    databases: tuple[int, ...] = (0,)
    replicas: int = 0  # under Sentinel


@dataclass(frozen=True)
class User:
    """A user as Redis keeps it: what it may do, and the SHA-256 of each password it takes, the one wanted first."""

    name: str
    rules: tuple[str, ...] = ()
    hashes: tuple[str, ...] = field(default=(), repr=False)
    flags: tuple[str, ...] = ("on",)

    @property
    def words(self) -> list[str]:
        return [*self.flags, "sanitize-payload", *(f"#{one}" for one in self.hashes), *self.rules]

    @property
    def line(self) -> str:
        return " ".join(["user", self.name, *self.words])

    def same(self, other: User | None) -> bool:
        """Redis tells passwords and rules in any order."""
        return other is not None and (set(self.hashes), {*self.flags, *self.rules}) == (
            set(other.hashes),
            {*other.flags, *other.rules},
        )

    def describe(self) -> str:
        number = len(self.hashes)
        passwords = "no password" if not number else "1 password" if number == 1 else f"{number} passwords"
        rules = " ".join(repr(rule)[1:-1] for rule in self.rules)
        return f"{self.name}: {passwords}\n{self.name}: {rules}\n"


def rules(role: str, layout: Layout, *, keys: Sequence[str] = (), extra: Sequence[str] = ()) -> tuple[str, ...]:
    """Keys, channels and commands of a role. `keys`: more patterns of keys; `extra`: more rules, in words of Redis."""
    prefix = literal(layout.prefix)
    # The prefix of the broker is none of the result backend.
    results = [f"{head}{name}*" for head in dict.fromkeys(("", prefix)) for name in _RESULT_KEYS]
    own: list[str] = []
    channels: list[str] = []
    apart: list[str] = []
    if role in ("worker", "beat", "operator"):
        # A worker sends tasks too, to any queue. PSUBSCRIBE takes patterns only that are allowed letter by letter.
        own = [f"~{prefix}*", *(f"~{key}" for key in results if prefix)]
        channels = ["&*"]
    elif role == "producer":
        queues = [f"{prefix}{literal(queue)}{end}" for queue in layout.queues for end in ("", f"{layout.sep}*")]
        own = [f"%W~{key}" for key in queues]
        channels = [f"&{prefix}/*.celeryev/task.sent"]
        apart = [
            *(_selector([f"%R~{key}" for key in queues], "llen") if queues else []),
            *_selector([f"~{prefix}_kombu.binding*"], _BIND),
            *_selector([f"{kind}{key}" for kind in "~&" for key in results], _RESULTS),
        ]
    elif role == "exporter":
        # Events need a queue of their own. It controls no worker: capture(wakeup=False).
        events = (
            "_kombu.binding.celeryev",
            "_kombu.binding_permanent.celeryev",
            "_kombu.binding_deadlines",
            "celeryev.*",
        )
        own = [f"%R~{prefix}*", *(f"~{prefix}{key}" for key in events)]
        channels = [f"&{prefix}/{number}.celeryev/*" for number in layout.databases]
    elif role == "sentinel":
        channels = ["&__sentinel__:hello"]
    words = COMMANDS[role]
    if role == "operator" and layout.replicas:
        words += f" {_FAILOVER}" + (f" {_CHOICE}" if layout.replicas > 1 else "")
    commands = [f"+{name}" for name in dict.fromkeys(words.split())]
    selects = [f"+select|{number}" for number in layout.databases if role not in ("replica", "sentinel")]
    return (*own, *(f"~{key}" for key in keys), *channels, "-@all", *commands, *selects, *extra, *apart)


def _selector(reach: Sequence[str], commands: str) -> list[str]:
    """Commands for these keys and channels only."""
    words = [*reach, *(f"+{name}" for name in dict.fromkeys(commands.split()))]
    return [f"({words[0]}", *words[1:-1], f"{words[-1]})"]


def administrator(password: str) -> User:
    """The user that roles and modules on the host of Redis are, and anybody who names none."""
    hashes = (digest(password),) if password else ()
    return User(ADMINISTRATOR, ("~*", "&*", "+@all"), hashes, ("on",) if hashes else ("on", NO_PASSWORD))


def check(users: Iterable[Mapping[str, object]], where: str = "celeryops_redis_users") -> None:
    """What is wrong with the users asked for, all of it in one message that holds no secret."""
    found: list[str] = []
    seen: set[str] = set()
    for user in users:
        name, role, password = (str(user.get(key) or "") for key in ("name", "role", "password"))
        if not _NAME.fullmatch(name) or name == ADMINISTRATOR:
            found.append(
                f"{where}: {name!r} is no name for a user; use letters, digits, dots and dashes, and not default"
            )
            continue
        if name in seen:
            found.append(f"{where}: two users are called {name}")
        seen.add(name)
        if role not in ROLES:
            found.append(f"{where}: the role of {name} is {role!r}; take one of {', '.join(ROLES)}")
        if len(password) < LEAST or not password.isprintable():
            found.append(
                f"{where}: the password of {name} is missing, shorter than {LEAST} characters, or not printable;"
                " make one with openssl rand -hex 24"
            )
        rest = user.get("rules") or []
        for rule in rest if isinstance(rest, list) else [rest]:
            if not _RULE.fullmatch(str(rule)):
                said = repr(rule) if str(rule)[:1] not in "><#!" else "that is a password"
                found.append(f"{where}: {name} has the rule {said}; write it as +get, -@all, ~key* or &channel*")
        for key in ("keys", "queues"):
            for pattern in user.get(key) or []:  # type: ignore[attr-defined]
                if re.search(r"[\s'\"]", str(pattern)) or not pattern:
                    found.append(f"{where}: {key} of {name}: {pattern!r} must not be empty or hold blanks or quotes")
    if found:
        raise PreconditionFailed("; ".join(found) + ".")


def parse(text: str) -> dict[str, User]:
    """The users of an aclfile, or of ACL LIST."""
    result: dict[str, User] = {}
    for row in text.splitlines():
        words = row.split()
        if len(words) < 2 or words[0] != "user":
            continue
        hashes = tuple(word[1:] for word in words[2:] if word.startswith("#") and _HASH.fullmatch(word[1:]))
        flags = tuple(word for word in words[2:] if word in ("on", "off", NO_PASSWORD))
        plain = (*flags, "sanitize-payload", "skip-sanitize-payload", "resetchannels")
        rest = tuple(word for word in words[2:] if word not in plain and not word.startswith("#"))
        result[words[1]] = User(words[1], rest, hashes, flags)
    return result


def known(written: Mapping[str, User], live: Mapping[str, User]) -> dict[str, User]:
    """The users of the file and of the Redis that runs; where they differ the latter counts."""
    return {**written, **{name: user for name, user in live.items() if not user.same(written.get(name))}}


def readable(written: Mapping[str, User], live: Mapping[str, User]) -> dict[str, User]:
    """The same, but rules as they were written: Redis tells another set of words for them."""
    found = known(written, live)
    return {name: replace(user, rules=written.get(name, user).rules) for name, user in found.items()}


def describe(users: Mapping[str, User]) -> str:
    return "".join(users[name].describe() for name in sorted(users))


@dataclass(frozen=True)
class Plan:
    users: list[User]  # all that there are to be from now on, the administrator first
    gone: list[str]  # users that are removed
    left: dict[str, str]  # what another step would take away: user -> "password" or "user"


def plan(found: Mapping[str, User], wanted: Sequence[User], step: str) -> Plan:
    """`prepare` takes no password and no user away; `finish` leaves what is wanted only."""
    keep = step == "prepare"
    users: list[User] = []
    left: dict[str, str] = {}
    names = {user.name for user in wanted}
    for user in wanted:
        earlier = found.get(user.name)
        # Who needed no password before is not told apart from who has one.
        more = sorted({*earlier.hashes} - {*user.hashes}) if earlier and user.hashes else []
        if more and keep:
            user = replace(user, hashes=(*user.hashes, *more))
            left[user.name] = "password"
        users.append(user)
    gone = []
    for name, user in found.items():
        if name in names:
            continue
        if keep:
            users.append(user)
            left[name] = "user"
        else:
            gone.append(name)
    return Plan(users, sorted(gone), left)


def turned(found: Mapping[str, User], users: Iterable[User]) -> bool:
    """Is another password wanted than before? Who connected until now may have done so with one that is to go."""
    return any(user.name in found and found[user.name].hashes[:1] != user.hashes[:1] for user in users)


def text(users: Iterable[User]) -> str:
    return "".join(f"{user.line}\n" for user in users)
