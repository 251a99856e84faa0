#!/bin/sh
# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# The processes of units get a signal. STOP: they live, hold what they hold, and do nothing. KILL: they are gone at once, and systemd
# may start them again. Environment: UNITS, SIGNAL.
set -eu
# shellcheck disable=SC2086
case $1 in
begin)
    for unit in $UNITS; do
        main=$(systemctl show -P MainPID "$unit")
        [ "$main" != 0 ] || { echo "$unit does not run" >&2 && exit 1; }
        # Stopped, they are killed by the cure.
        ps -o pid= -p "$main" --ppid "$main" >>told
    done
    systemctl kill -s "$SIGNAL" $UNITS
    ;;
hold) exec sleep infinity ;;
end)
    systemctl kill -s CONT $UNITS || true
    # A restart that was asked for is not held against the unit.
    systemctl reset-failed $UNITS || true
    systemctl start $UNITS
    ;;
esac
