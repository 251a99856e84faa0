#!/bin/sh
# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# A worker is told to consume nothing; it answers as before. Environment: NODE, QUEUES, ROOT, CELERYOPS_APP, AS_USER, AS_GROUP.
set -eu
tell() {
    # Not every user of Redis may command workers.
    # shellcheck disable=SC1090
    if [ -n "${CELERYOPS_OPERATOR_FILE:-}" ]; then
        set -a
        . "$CELERYOPS_OPERATOR_FILE"
        set +a
    fi
    cd "$ROOT/current/src"
    for queue in $QUEUES; do
        setpriv --reuid "$AS_USER" --regid "$AS_GROUP" --init-groups "$ROOT/current/venv/bin/python" -m celery \
            -A "$CELERYOPS_APP" --skip-checks control --timeout 5 --destination "$NODE" "$1" "$queue" >/dev/null
    done
}
case $1 in
begin) tell cancel_consumer ;;
hold) exec sleep infinity ;;
end) tell add_consumer ;;
esac
