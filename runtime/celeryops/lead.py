# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""One beat at a time, in the whole fleet, and no run twice or lost when another takes over.

The beat that leads claims each run in the broker before it sends it (engine/schedule.py). The others wait; when the
leader ends they follow at once, when it dies or is cut off they follow once its lease is over, and they go on with the
times of the last runs that it left. Entries which operators disabled are passed over. Without Redis there are no
records, and beat works as ever.
"""

from __future__ import annotations

import atexit
import logging
import os
import socket
import time
import uuid
from datetime import datetime, timezone
from typing import Any

from celery.beat import Scheduler
from celery.signals import beat_init

from ._environment import disabled, release
from .engine import schedule
from .engine.connection import LinkedStore
from .engine.pauses import now_of

logger = logging.getLogger(__name__)

# Seconds: how often a beat that waits looks, a run that could not be claimed is tried again, a command may take.
LOOK, AGAIN, PATIENCE = 1.0, 1.0, 5.0


def _began(pid: int) -> int:
    """When the process began, in the kernel's ticks; 0 if there is none."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as stat:
            fields = stat.read().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] in "ZX" else int(fields[19])


def _machine() -> str:
    """This host since its boot, as far as we see its processes: here a process that is not there is dead."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as boot:
            return f"{socket.gethostname()} {boot.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def lease_seconds() -> float:
    text = os.environ.get("CELERYOPS_BEAT_LEASE", "")
    try:
        seconds = float(text or schedule.LEASE)
    except ValueError:
        seconds = 0.0
    if seconds < 3:
        logger.warning("CELERYOPS_BEAT_LEASE: %r is no number of seconds from 3 on; %s count", text, schedule.LEASE)
        return float(schedule.LEASE)
    return seconds


def _denied(exc: Exception) -> bool:
    """Redis is there and will never do it, as when its ACL forbids scripts. Waiting for it would silence beat.

    Any other error passes by (out of memory, disk full, a replica): to send then would be to send beside others.
    """
    import redis

    text = str(exc)
    return isinstance(exc, redis.exceptions.NoPermissionError) or (
        isinstance(exc, redis.exceptions.ResponseError)
        and ("unknown command" in text or "user executing the script can't" in text)
    )


class Baton:
    """Whether this process leads."""

    def __init__(self, scheduler: Any, application: str) -> None:
        self.scheduler = scheduler
        self.application = application
        self.lease = lease_seconds()
        self.connection: Any = None
        self.lead: schedule.Lead | None = None
        self.value = b""  # our record while we lead
        self.taken = b""
        self.renewed = 0.0  # time.monotonic() before the record was renewed last
        self.told = ""
        self.off = False

    def tell(self, text: str, level: int = logging.WARNING) -> None:
        if text != self.told:
            logger.log(level, "celeryops: %s", text)
        self.told = text

    def open(self) -> schedule.Lead | None:
        """None where the broker is not Redis."""
        if self.lead is None:
            bounds = {"socket_timeout": PATIENCE, "socket_connect_timeout": PATIENCE}
            bounds |= {"max_retries": 1, "interval_start": 0}  # who waits asks again by itself
            self.connection = self.scheduler.app.connection_for_write(transport_options=bounds)
            store = LinkedStore.of(self.connection)
            if store is None:
                self.off = True
                return None
            self.lead = schedule.Lead(store, self.application, self.lease)
        return self.lead

    def close(self) -> None:
        connection, self.connection, self.lead = self.connection, None, None
        if connection is not None:
            try:
                connection.release()
            except Exception:
                logger.debug("celeryops: the connection was lost", exc_info=True)

    def failed(self, exc: Exception) -> bool:
        """Whether beat is to go on without records."""
        self.close()
        self.off = _denied(exc)
        if self.off:
            logger.error("celeryops: beat cannot keep its records and sends without them: %r", exc)
        else:
            self.tell(f"beat waits, the broker cannot be asked who leads: {exc!r}")
        return self.off

    def leads(self) -> bool:
        """Before every tick."""
        if self.off:
            return True
        now = time.monotonic()
        if self.value and now - self.renewed < self.lease / 6:
            return True
        try:
            lead = self.open()
            if lead is None:
                return True
            if self.value and lead.renew(self.value):
                self.renewed = now
                return True
            if self.value:
                self.value = b""
                self.tell("beat was cut off for longer than its lease and stops sending")
            return self.take(lead, now)
        except Exception as exc:
            if self.failed(exc):
                return True
            # Before the lease is over for others it is over for us.
            if self.value and time.monotonic() - self.renewed > self.lease * 2 / 3:
                self.value = b""
            return bool(self.value)

    def take(self, lead: schedule.Lead, now: float) -> bool:
        me = schedule.Leader(
            os.environ.get("CELERYOPS_BEAT_HOST") or socket.gethostname(),
            os.getpid(),
            _machine(),
            _began(os.getpid()),
            round(now_of(lead.store), 3),
            str(uuid.uuid4()),
            release() or "",
        )
        # What was taken before and not gone on with, because Redis went away, is ours too.
        raw = lead.take(me, self.taken)
        found = schedule.parse_leader(raw)
        if found is not None and found.token != me.token and self.is_dead(found):
            raw = lead.take(me, raw)
            found = schedule.parse_leader(raw)
        if found is None:
            self.tell(f"beat waits: {lead.key} holds no record of this collection. Look who writes it")
            return False
        if found.token != me.token:
            self.tell(f"beat waits, {found} leads", logging.INFO)
            return False
        self.taken = raw
        if not self.go_on(lead, raw):
            return False
        self.value, self.renewed = raw, now
        self.tell("beat leads", logging.INFO)
        return True

    @staticmethod
    def is_dead(found: schedule.Leader) -> bool:
        return bool(found.machine) and found.machine == _machine() and _began(found.pid) != found.began

    def go_on(self, lead: schedule.Lead, value: bytes) -> bool:
        """Take over the times of the last runs, and leave ours where there are none."""
        recorded = schedule.runs(lead.store, self.application)
        counted: dict[str, schedule.Run] = {}
        for name, entry in self.scheduler.schedule.items():
            own = schedule.Run(entry.last_run_at.timestamp(), entry.total_run_count)
            run = counted[name] = schedule.later(recorded.get(name), own)
            if run != own:
                zone = entry.default_now().tzinfo
                entry.last_run_at = datetime.fromtimestamp(run.last, timezone.utc).astimezone(zone)
                entry.total_run_count = run.count
        self.scheduler._heap = None  # made anew by the next tick
        return bool(lead.go_on(value, counted, set(recorded) - set(counted)))

    def claim(self, entry: Any) -> str:
        if self.off:
            return str(schedule.SEND)
        try:
            lead = self.open()
            if lead is None:
                return str(schedule.SEND)
            now = time.monotonic()
            verdict = lead.claim(self.value, entry.name, entry.default_now().timestamp(), entry.total_run_count)
        except Exception as exc:
            return str(schedule.SEND if self.failed(exc) else schedule.FOLLOW)
        if verdict == schedule.FOLLOW:
            self.value = b""
        else:
            self.renewed = now
        return str(verdict)

    def leave(self) -> None:
        """The next one need not wait for the lease to end."""
        if self.lead is not None and self.value:
            try:
                self.lead.leave(self.value)
            except Exception:
                logger.debug("celeryops: the lease ends by itself", exc_info=True)
        self.value = b""
        self.close()


def attach(scheduler: Any, baton: Baton) -> None:
    tick, is_due = scheduler.tick, scheduler.is_due

    def ticking(*args: Any, **kwargs: Any) -> Any:
        if not baton.leads():
            return LOOK
        seconds = tick(*args, **kwargs)
        return min(seconds, baton.lease / 6) if isinstance(seconds, (int, float)) else seconds

    def judging(entry: Any) -> Any:
        due, seconds = is_due(entry)
        if not due:
            return due, seconds
        verdict = baton.claim(entry)
        if verdict == schedule.SEND:
            return due, seconds
        if verdict == schedule.REST:
            # Not made up for later: once it is enabled its next regular time counts. The heap is made anew, for before
            # Celery 5.7 it would keep this entry on top and none of the others would be sent.
            entry.last_run_at = entry.default_now()
            scheduler._heap = None
            return False, 0
        return False, AGAIN

    scheduler.tick, scheduler.is_due = ticking, judging


def _init(sender: Any, **_: Any) -> None:
    application = os.environ.get("CELERYOPS_APP_NAME", "")
    if not application:
        return
    try:
        scheduler = sender.scheduler
        if type(scheduler).tick is not Scheduler.tick:
            logger.warning("celeryops: %s has a way of its own, two of it are not kept apart", type(scheduler).__name__)
            return
        baton = Baton(scheduler, application)
        attach(scheduler, baton)
        atexit.register(baton.leave)
    except Exception:
        logger.exception("celeryops: beat runs alone, without a look at others")


# After heartbeat, whose ticks are then those of the beat that leads. Sent by a beat inside a worker (-B) too.
if "lead" not in disabled():
    beat_init.connect(_init)
