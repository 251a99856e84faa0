#!/bin/sh
# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# Somebody opens connections to Redis and forgets them, until most are taken. Environment: PORT, REDISCLI_AUTH.
set -eu
case $1 in
begin)
    redis-cli -p "$PORT" --no-auth-warning CONFIG GET maxclients | tail -n 1 >most
    grep -qx '[0-9]*' most
    ;;
hold)
    exec python3 -I -c '
import resource, socket, sys, time

count = int(sys.argv[1]) * 9 // 10
_soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
held = [socket.create_connection(("127.0.0.1", int(sys.argv[2]))) for _number in range(min(count, hard - 50))]
time.sleep(1e6)
' "$(cat most)" "$PORT"
    ;;
end) ;;
esac
