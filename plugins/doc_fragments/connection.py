# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations


class ModuleDocFragment:
    DOCUMENTATION = r"""
options:
  broker_url:
    description:
      - URL of the broker, as in C(redis://:secret@host:6379/0).
      - Schemes are C(redis), C(rediss), C(redis+socket), C(sentinel), C(amqp) and C(amqps).
      - Several URLs are joined by C(;).
      - Wins over O(environment_file) and O(app).
    type: str
  app:
    description:
      - The Celery application as C(pkg.module:app).
      - Imported only where neither O(broker_url) nor O(environment_file) names the broker, or where the module says so.
    type: str
  app_dir:
    description: Working directory for the import of O(app).
    type: path
  virtualenv:
    description:
      - The application's virtual environment on the host, which provides C(redis) and C(celery).
      - Where its Python is of another minor version than the one Ansible uses, the module runs again under it.
    type: path
  environment_file:
    description:
      - A systemd C(EnvironmentFile) on the host with C(CELERY_BROKER_URL), and optionally C(CELERY_RESULT_BACKEND),
        C(CELERYOPS_KEY_PREFIX) and C(CELERYOPS_TRANSPORT_OPTIONS) (JSON).
      - The secret is read on the host and never travels.
    type: path
  key_prefix:
    description: Kombu's C(global_keyprefix).
    type: str
  transport_options:
    description:
      - As C(broker_transport_options) of Celery, for example C(priority_steps), C(sep), C(master_name).
      - Values under names such as C(password) are masked. Better keep them in O(environment_file).
    type: dict
  tls:
    description: TLS to the broker, beside or instead of the C(ssl_) parameters of a C(rediss) URL.
    type: dict
    suboptions:
      ca_certs:
        description: File of the certificates to trust.
        type: path
      certfile:
        description: File of the client certificate.
        type: path
      keyfile:
        description: File of the client's key.
        type: path
      verify:
        description: Whether the broker's certificate and name must be valid.
        type: bool
        default: true
  connect_timeout:
    description: Seconds to wait for a connection.
    type: float
    default: 5.0
  socket_timeout:
    description: Seconds to wait for any answer of the broker.
    type: float
    default: 10.0
requirements:
  - redis (from the application's virtual environment, see O(virtualenv))
"""
