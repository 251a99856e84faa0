#!/bin/sh
# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# Units are killed at once, with all their processes; systemd may start them again. Environment: UNITS.
set -eu
# shellcheck disable=SC2086
case $1 in
begin)
    for unit in $UNITS; do
        main=$(systemctl show -P MainPID "$unit")
        [ "$main" != 0 ] || { echo "$unit does not run" >&2 && exit 1; }
        ps -o pid= -p "$main" --ppid "$main" >>told
    done
    systemctl kill -s KILL $UNITS
    ;;
hold) exec sleep infinity ;;
end)
    # The restart that was asked for is not held against the unit.
    systemctl reset-failed $UNITS || true
    systemctl start $UNITS
    ;;
esac
