#!/bin/sh
# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# Redis is down, and the last command in its append-only file is cut off. Environment: UNITS, DATA.
set -eu
# shellcheck disable=SC2086
case $1 in
begin)
    # shellcheck disable=SC2012
    file=$(ls -t "$DATA"/appendonlydir/*.incr.aof 2>/dev/null | head -n 1)
    [ -n "$file" ] || { echo "there is no append-only file in $DATA" >&2 && exit 1; }
    systemctl stop $UNITS
    printf '%s\n%s\n' "$file" "$(stat -c %s "$file")" >was
    # shellcheck disable=SC2016
    printf '*3\r\n$5\r\nLPU' >>"$file"
    ;;
hold) exec sleep infinity ;;
end)
    if [ -e was ]; then
        { read -r file && read -r size; } <was
        # Nobody has repaired it.
        if [ -e "$file" ] && [ "$(stat -c %s "$file")" = $((size + 11)) ]; then
            truncate -s "$size" "$file"
        fi
    fi
    systemctl start $UNITS
    ;;
esac
