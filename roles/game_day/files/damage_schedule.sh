#!/bin/sh
# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# Beat can neither read its schedule nor throw it away: it fails, is started again, and so on. Environment: UNITS, DATA.
set -eu
case $1 in
begin)
    file=$(find "$DATA" -maxdepth 1 -type f -name 'schedule*' | sort | head -n 1)
    [ -n "$file" ] || { echo "there is no schedule in $DATA" >&2 && exit 1; }
    systemctl stop "$UNITS"
    cp -a "$file" kept
    printf '%s\n' "$file" >was
    rm "$file"
    mkdir "$file"
    systemctl start --no-block "$UNITS"
    ;;
hold) exec sleep infinity ;;
end)
    if [ -e was ]; then
        read -r file <was
        # Nobody has moved it aside.
        if [ -d "$file" ]; then
            systemctl stop "$UNITS"
            rmdir "$file"
            cp -a kept "$file"
        fi
    fi
    systemctl reset-failed "$UNITS" || true
    systemctl start "$UNITS"
    ;;
esac
