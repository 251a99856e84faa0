# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Revoked task ids that outlast every worker: a sorted set in the broker, by the time at which each is forgotten."""

from __future__ import annotations

from collections.abc import Sequence

from .connection import RedisStore
from .errors import PreconditionFailed

# Celery's own bound of the ids one worker keeps.
MOST = 50_000
# As long as a result is kept unless said otherwise.
EXPIRES = 86_400.0

# At once, so that two runs together do not pass the bound.
_REMEMBER = """
local now, most, ends = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
local fresh = 0
for i = 4, #ARGV do
    if not redis.call('ZSCORE', KEYS[1], ARGV[i]) then fresh = fresh + 1 end
end
local kept = redis.call('ZCARD', KEYS[1])
if kept + fresh > most then return {kept, -1} end
for i = 4, #ARGV do
    local known = tonumber(redis.call('ZSCORE', KEYS[1], ARGV[i]) or 0)
    if ends > known then redis.call('ZADD', KEYS[1], ends, ARGV[i]) end
end
local last = redis.call('ZREVRANGE', KEYS[1], 0, 0, 'WITHSCORES')
if last[2] then redis.call('EXPIREAT', KEYS[1], math.ceil(tonumber(last[2])) + 1) end
return {kept + fresh, fresh}
"""


def revokes_key(key_prefix: str) -> str:
    return f"{key_prefix}celeryops:revokes"


def remember(store: RedisStore, ids: Sequence[str], expires: float = EXPIRES) -> int:
    """Keep the ids for `expires` seconds at least; how many were not known yet.

    Every worker that loads the runtime part `revokes` refuses them from its start on. A worker that runs already hears
    of them by remote control.
    """
    if expires <= 0:
        raise PreconditionFailed(f"expires: must be above 0 seconds, not {expires:g}.")
    wanted = list(dict.fromkeys(ids))
    if not wanted:
        return 0
    if len(wanted) > MOST:
        raise PreconditionFailed(f"{len(wanted)} ids cannot be remembered as revoked, {MOST} at most.")
    now = _now(store)
    added = 0
    # Lua takes a bounded number of arguments.
    for first in range(0, len(wanted), 1000):
        some = wanted[first : first + 1000]
        kept, fresh = store.redis.eval(
            _REMEMBER, 1, revokes_key(store.key_prefix), repr(now), MOST, repr(now + expires), *some
        )
        if fresh < 0:
            raise PreconditionFailed(
                f"{kept} revoked ids are remembered already, {MOST} at most: {len(wanted) - first} of {len(wanted)} "
                f"were not added. Revoke fewer at a time, with a shorter expiry, or drop the messages instead.",
                remembered=wanted[:first],
            )
        added += fresh
    return added


def forget(store: RedisStore, ids: Sequence[str]) -> int:
    """How many of them were remembered. Workers that know them already go on refusing them until they restart."""
    return int(store.redis.zrem(revokes_key(store.key_prefix), *ids)) if ids else 0


def load(store: RedisStore) -> list[str]:
    """The ids that count now."""
    found = store.redis.zrangebyscore(revokes_key(store.key_prefix), f"({_now(store)!r}", "+inf")
    return [item.decode(errors="replace") for item in found]


def _now(store: RedisStore) -> float:
    seconds, micros = store.redis.time()
    return float(seconds) + float(micros) / 1e6
