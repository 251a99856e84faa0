#!/bin/sh
# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# If the Redis of this host is the primary, it is killed and does not come back. Environment: UNITS, PORT, REDISCLI_AUTH.
set -eu
case $1 in
begin)
    [ "$(redis-cli -p "$PORT" --no-auth-warning ROLE | head -n 1)" = master ] || exit 0
    echo primary >told
    systemctl mask --quiet --runtime "$UNITS"
    systemctl kill -s KILL "$UNITS"
    ;;
hold) exec sleep infinity ;;
end)
    systemctl unmask --quiet --runtime "$UNITS"
    systemctl reset-failed "$UNITS" || true
    systemctl start "$UNITS"
    ;;
esac
