#!/bin/sh
# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# A Redis that has written snapshots only and is restarted with an append-only file starts empty. This makes the running
# one write its data there first. From the environment: PASSWORD, the one of the new configuration, and
# PASSWORD_BEFORE; SOCKET, where Redis may listen too.
set -eu
data=/var/lib/redis
fail() { echo "$*" >&2; exit 1; }

[ ! -e "$data/appendonlydir" ] || exit 0
if ! systemctl is-active --quiet redis-server; then
    [ ! -s "$data/dump.rdb" ] ||
        fail "$data/dump.rdb holds data, there is no append-only file, and Redis does not run. Restarted with what is asked, it would
start empty: start it as it was, without $1, and run again"
    exit 0
fi
port=$(tr '\0' ' ' <"/proc/$(systemctl show -P MainPID redis-server)/cmdline" | sed -n 's/^[^ ]* [^ ]*:\([0-9][0-9]*\).*/\1/p')
reach="-p ${port:-6379}"
[ ! -S "${SOCKET:-}" ] || reach="-s $SOCKET"
# shellcheck disable=SC2086
cli() { REDISCLI_AUTH=$auth redis-cli $reach --no-auth-warning "$@"; }
for auth in "" "$PASSWORD" "${PASSWORD_BEFORE:-}"; do
    [ "$(cli PING 2>/dev/null)" != PONG ] || break
done
[ "$(cli PING 2>/dev/null)" = PONG ] ||
    fail "the Redis that runs takes neither celery_redis_password nor none, so its data cannot be brought into an append-only file
before the restart: run CONFIG SET appendonly yes there yourself, wait until it is written, and run again"
[ "$(cli CONFIG GET appendonly | tail -n 1)" != yes ] || exit 0
cli INFO keyspace | grep -q '^db' || exit 0
cli CONFIG SET appendonly yes >/dev/null
end=$(($(date +%s) + 600))
while [ "$(date +%s)" -lt "$end" ]; do
    # grep fails where it counts none.
    state=$(cli INFO persistence | tr -d '\r' | grep -E '^aof_(enabled:1|rewrite_in_progress:0|rewrite_scheduled:0|last_bgrewrite_status:ok)$' -c || true)
    if [ "$state" = 4 ]; then
        echo written
        exit 0
    fi
    sleep 0.2
done
fail "the append-only file was not written within 600 s; look at the log of Redis"
