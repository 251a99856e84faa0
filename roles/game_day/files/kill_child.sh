#!/bin/sh
# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# The largest pool process of a worker is killed, as the kernel does it when memory runs out. Environment: UNITS.
set -eu
case $1 in
begin)
    main=$(systemctl show -P MainPID "$UNITS")
    child=$(ps -o pid= --ppid "$main" --sort=-rss | head -n 1)
    [ -n "$child" ] || { echo "$UNITS has no pool processes; this needs the prefork pool" >&2 && exit 1; }
    # shellcheck disable=SC2086
    kill -KILL $child
    echo "$child" >told
    ;;
hold) exec sleep infinity ;;
end) ;;
esac
