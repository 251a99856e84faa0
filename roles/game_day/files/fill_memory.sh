#!/bin/sh
# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# Redis has all the memory that it may use and takes no writes. Environment: PORT, REDISCLI_AUTH.
set -eu
ask() { redis-cli -p "$PORT" --no-auth-warning "$@"; }
case $1 in
begin)
    [ "$(ask CONFIG GET maxmemory-policy | tail -n 1)" = noeviction ] ||
        { echo "maxmemory-policy is not noeviction: Redis would throw tasks away" >&2 && exit 1; }
    ask CONFIG GET maxmemory | tail -n 1 >was
    [ "$(ask CONFIG SET maxmemory 1mb)" = OK ]
    ;;
hold) exec sleep infinity ;;
end) [ ! -s was ] || [ "$(ask CONFIG SET maxmemory "$(cat was)")" = OK ] ;;
esac
