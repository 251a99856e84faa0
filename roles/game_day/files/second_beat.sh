#!/bin/sh
# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# Somebody starts a beat by hand. Environment: ROOT, CELERYOPS_APP, AS_USER, AS_GROUP.
set -eu
case $1 in
hold)
    cd "$ROOT/current/src"
    exec setpriv --reuid "$AS_USER" --regid "$AS_GROUP" --init-groups "$ROOT/current/venv/bin/python" -m celery \
        -A "$CELERYOPS_APP" beat --schedule /tmp/schedule --pidfile=
    ;;
*) ;;
esac
