# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import json
import os

from celery import Celery
from celery.schedules import crontab

from .version import INCLUDE

QUEUES = ("critical", "default", "email", "reports", "maintenance")

key_prefix = os.environ.get("CELERYOPS_KEY_PREFIX")
app = Celery("shop", include=INCLUDE)
app.conf.update(
    broker_url=os.environ.get("CELERY_BROKER_URL", "redis://localhost:6379/0"),
    result_backend=os.environ.get("CELERY_RESULT_BACKEND") or None,
    broker_transport_options={
        "visibility_timeout": 3600,
        # Seconds; without them nobody notices that the host of Redis is gone without a word.
        "socket_connect_timeout": 5,
        "socket_timeout": 30,
        "socket_keepalive": True,
        **json.loads(os.environ.get("CELERYOPS_TRANSPORT_OPTIONS") or "{}"),
        **({"global_keyprefix": key_prefix} if key_prefix else {}),
    },
    broker_connection_retry_on_startup=True,
    # A chord whose part cannot write its result is never settled.
    result_backend_always_retry=True,
    redis_backend_health_check_interval=30,
    redis_socket_keepalive=True,
    worker_prefetch_multiplier=1,
    task_ignore_result=True,
    result_extended=True,
    task_default_queue="default",
    task_routes={
        "shop.charge_card": {"queue": "critical"},
        "shop.reserve_stock": {"queue": "critical"},
        "shop.send_*": {"queue": "email"},
        "shop.sales_report": {"queue": "reports"},
        "shop.close_day": {"queue": "reports"},
        "shop.expire_carts": {"queue": "maintenance"},
        "shop.refresh_catalogue": {"queue": "maintenance"},
    },
    beat_schedule={
        "expire-carts": {"task": "shop.expire_carts", "schedule": 10.0, "options": {"expires": 60}},
        "refresh-catalogue": {"task": "shop.refresh_catalogue", "schedule": 60.0, "options": {"expires": 300}},
        "nightly-sales-report": {"task": "shop.sales_report", "schedule": crontab(hour=2, minute=30), "args": [1.0]},
    },
)
