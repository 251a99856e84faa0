# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.celeryops.runbook.plugins.module_utils import _module
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.errors import NodeUnknown, PreconditionFailed

pytestmark = pytest.mark.ansible


class Ended(Exception):
    pass


@pytest.fixture
def result(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the module under test would print, in place of its exit."""
    found: dict[str, Any] = {}

    def end(self: Any, **kwargs: Any) -> None:
        found.update(kwargs)
        raise Ended

    monkeypatch.setattr(_module.AnsibleModule, "exit_json", end)
    monkeypatch.setattr(
        _module.AnsibleModule, "fail_json", lambda self, msg, **kw: end(self, failed=True, msg=msg, **kw)
    )
    return found


def start(monkeypatch: pytest.MonkeyPatch, body: Any, libraries: tuple[str, ...] = (), **arguments: Any) -> None:
    from ansible.module_utils import basic
    from ansible.module_utils.testing import patch_module_args

    monkeypatch.setattr(basic.AnsibleModule, "_log_invocation", lambda self: None)
    with patch_module_args(arguments), pytest.raises(Ended):
        _module.run(body, libraries=libraries)


def test_errors_are_mapped_and_scrubbed(monkeypatch: pytest.MonkeyPatch, result: dict[str, Any]) -> None:
    def body(module: Any) -> dict[str, Any]:
        module.broker_spec()
        raise NodeUnknown("no a@x at redis://:hunter2@h/0, hunter2", node="a@x", text="redis://:hunter2@h/0")

    start(monkeypatch, body, broker_url="redis://:hunter2@h/0")
    assert result == {
        "failed": True,
        "msg": "no a@x at ***, ***",
        "category": "node_unknown",
        "node": "a@x",
        "text": "redis://***@h/0",
    }


def test_a_crash_is_one_line_and_a_scrubbed_traceback(monkeypatch: pytest.MonkeyPatch, result: dict[str, Any]) -> None:
    def body(module: Any) -> dict[str, Any]:
        module.broker_spec()
        raise ZeroDivisionError("with hunter2")

    start(monkeypatch, body, broker_url="redis://:hunter2@h/0")
    assert result["category"] == "unexpected"
    assert result["msg"] == "unexpected ZeroDivisionError: with ***"
    assert "hunter2" not in json.dumps(result)


def test_results_are_scrubbed(monkeypatch: pytest.MonkeyPatch, result: dict[str, Any]) -> None:
    start(monkeypatch, lambda module: {"alternates": ["redis://:hunter2@h/0"]})
    assert result == {"alternates": ["redis://***@h/0"]}


def test_secrets_of_transport_options_are_known(monkeypatch: pytest.MonkeyPatch, result: dict[str, Any]) -> None:
    options = {"master_name": "m", "sentinel_kwargs": {"password": "hunter2"}}
    start(monkeypatch, lambda module: {"secrets": module.secrets}, transport_options=options)
    assert result == {"secrets": ["hunter2"]}


def test_a_missing_library_names_the_option(monkeypatch: pytest.MonkeyPatch, result: dict[str, Any]) -> None:
    start(monkeypatch, lambda module: {}, libraries=("no_such_library",))
    assert "no_such_library is missing" in result["msg"]
    assert "Set virtualenv" in result["msg"]


def test_a_virtualenv_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(PreconditionFailed, match="virtualenv: there is no"):
        _module.activate(str(tmp_path))


def test_the_venv_of_the_same_python_is_used_in_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packages = tmp_path / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    packages.mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    (tmp_path / "linked").mkdir()
    (packages / "extra.pth").write_text(f"{tmp_path}/linked\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    _module.activate(str(tmp_path))
    assert sys.path[:2] == [str(packages), str(tmp_path / "linked")]


def test_the_venv_of_another_python_respawns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lib" / "python3.1" / "site-packages").mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()

    def respawn(python: str) -> None:
        raise Ended(python)

    monkeypatch.setattr(_module, "respawn_module", respawn)
    with pytest.raises(Ended, match="bin/python"):
        _module.activate(str(tmp_path))
