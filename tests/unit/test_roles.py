# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The roles as data, and the programs they send to the hosts."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.ansible

TOP = Path(__file__).resolve().parents[2]
ROLES = sorted(path.parents[1].name for path in TOP.glob("roles/*/meta/argument_specs.yml"))


def load(path: str) -> Any:
    return yaml.safe_load((TOP / path).read_text())


def program(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, TOP / "roles" / "release" / "files" / f"{name}.py")
    if spec is None or spec.loader is None:
        raise AssertionError(name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("role", ROLES)
def test_every_default_is_specified_and_every_option_has_a_default(role: str) -> None:
    specs = load(f"roles/{role}/meta/argument_specs.yml")["argument_specs"]
    path = f"roles/{role}/defaults/main.yml"
    defaults = set(load(path) or {}) if (TOP / path).is_file() else set()
    asked: set[str] = set()
    for entry, spec in specs.items():
        options = set(spec.get("options", {}))
        required = {name for name in options if spec["options"][name].get("required")}
        assert options - required <= defaults, entry
        assert spec["short_description"] and spec["description"], entry
        asked |= options
    assert defaults <= asked


@pytest.mark.parametrize("role", ROLES)
def test_every_entry_point_is_a_file_of_tasks(role: str) -> None:
    specs = load(f"roles/{role}/meta/argument_specs.yml")["argument_specs"]
    for entry in specs:
        assert (TOP / "roles" / role / "tasks" / f"{entry}.yml").is_file(), entry


def test_every_part_of_the_runtime_can_be_switched_off_by_name() -> None:
    options = load("roles/worker/meta/argument_specs.yml")["argument_specs"]["main"]["options"]
    parts = importlib.util.spec_from_file_location("_environment", TOP / "runtime" / "celeryops" / "_environment.py")
    assert parts and parts.loader
    module = importlib.util.module_from_spec(parts)
    parts.loader.exec_module(module)
    assert options["celery_worker_disable"]["choices"] == list(module.PARTS)


@pytest.mark.parametrize("role", ROLES)
def test_secrets_are_marked_in_the_specs(role: str) -> None:
    specs = load(f"roles/{role}/meta/argument_specs.yml")["argument_specs"]
    for option, spec in (pair for entry in specs.values() for pair in entry.get("options", {}).items()):
        if option.endswith(("_broker_url", "_result_backend", "_environment", "_password")):
            assert spec.get("no_log") is True, option


def test_the_stop_bound_of_the_verbs_is_above_that_of_the_unit() -> None:
    unit = (TOP / "templates/systemd/worker@.service.j2").read_text()
    # Warm stop for stop_timeout, then SIGTERM with TimeoutStopSec; the verb kills after both.
    assert "TimeoutStopSec={{ settings.soft_shutdown_timeout | int + 20 }}" in unit
    bound = load("roles/worker/vars/main.yml")["__celery_worker_stop_bound"]
    assert bound == "{{ (celery_worker_stop_timeout | int) + (celery_worker_soft_shutdown_timeout | int) + 35 }}"


# They hold it over several plays, and where they break off until their lease ends: half of the fleet is elsewhere then.
HOLDERS = ("rolling_deploy", "upgrade_celery")


def lock_tasks(tasks: list[Any], state: str) -> list[Any]:
    found = [task.get("celeryops.runbook.celery_deploy_lock") for task in tasks]
    return [one for one in found if one and one.get("state", "held") == state]


def takers(tasks: list[Any]) -> list[bool]:
    """Of each list of tasks that takes the deploy lock: is it a block that gives it back in any case?"""
    found = [False] * len(lock_tasks(tasks, "held"))
    for task in tasks:
        if lock_tasks(task.get("block", []), "held"):
            found.append(bool(lock_tasks(task.get("always", []), "released")))
        else:
            found += takers(task.get("block", []))
    return found


@pytest.mark.parametrize("playbook", sorted(path.stem for path in TOP.glob("playbooks/*.yml")))
def test_who_takes_the_deploy_lock_gives_it_back_in_any_case(playbook: str) -> None:
    found = [one for play in load(f"playbooks/{playbook}.yml") for one in takers(play.get("tasks", []))]
    assert all(found) or playbook in HOLDERS
    assert found or playbook != "redis_failover"


# the bundle: what the controller sends


def bundle(folder: Path, kind: str, source: Path, wheelhouse: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOP / "roles/release/files/bundle.py"), str(folder), str(TOP), kind, str(source)]
    return subprocess.run([*command, "requirements.txt", wheelhouse], capture_output=True, text=True, check=False)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    (folder / "pkg" / "__pycache__").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("secret")
    (folder / "pkg" / "__pycache__" / "a.pyc").write_text("x")
    (folder / "pkg" / "a.py").write_text("A = 1\n")
    (folder / "run").write_text("#!/bin/sh\n")
    (folder / "run").chmod(0o755)
    (folder / "requirements.txt").write_text("celery\n")
    return folder


def names(pack: dict[str, str]) -> dict[str, int]:
    with tarfile.open(pack["path"]) as tar:
        return {member.name: member.mode for member in tar}


def test_bundle_leaves_out_what_is_no_source(tmp_path: Path, source: Path) -> None:
    done = bundle(tmp_path / "out", "directory", source)
    assert done.returncode == 0, done.stderr
    assert names(json.loads(done.stdout)["source"]) == {"pkg/a.py": 0o644, "requirements.txt": 0o644, "run": 0o755}


def test_bundle_digest_depends_on_content_only(tmp_path: Path, source: Path) -> None:
    first = json.loads(bundle(tmp_path / "one", "directory", source).stdout)
    os.utime(source / "pkg" / "a.py", (1, 1))
    second = json.loads(bundle(tmp_path / "two", "directory", source).stdout)
    assert {k: v["digest"] for k, v in first.items()} == {k: v["digest"] for k, v in second.items()}
    (source / "pkg" / "a.py").write_text("A = 2\n")
    third = json.loads(bundle(tmp_path / "three", "directory", source).stdout)
    assert third["source"]["digest"] != first["source"]["digest"]
    assert third["runtime"]["digest"] == first["runtime"]["digest"]


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_bundle_of_an_archive_equals_that_of_its_directory(tmp_path: Path, source: Path, kind: str) -> None:
    archive = tmp_path / f"v1.{kind}"
    files = [source / "pkg" / "a.py", source / "requirements.txt", source / "run"]
    if kind == "tar":
        with tarfile.open(archive, "w:gz") as tar:
            for file in files:
                tar.add(file, f"shop-1.0/{file.relative_to(source)}")
    else:
        with zipfile.ZipFile(archive, "w") as packed:
            for file in files:
                packed.write(file, f"shop-1.0/{file.relative_to(source)}")
    done = bundle(tmp_path / "a", "archive", archive)
    assert done.returncode == 0, done.stderr
    directory = json.loads(bundle(tmp_path / "d", "directory", source).stdout)
    assert json.loads(done.stdout)["source"]["digest"] == directory["source"]["digest"]


def test_bundle_refuses_an_archive_that_points_out_of_itself(tmp_path: Path) -> None:
    archive = tmp_path / "evil.tar"
    with tarfile.open(archive, "w") as tar:
        info = tarfile.TarInfo("../../etc/cron.d/evil")
        tar.addfile(info, io.BytesIO(b""))
    done = bundle(tmp_path / "out", "archive", archive)
    assert done.returncode == 1
    assert "points out of the archive" in done.stderr


def test_bundle_names_the_variable_that_is_wrong(tmp_path: Path, source: Path) -> None:
    assert "celeryops_release_src" in bundle(tmp_path / "a", "directory", tmp_path / "nowhere").stderr
    assert "celeryops_wheelhouse" in bundle(tmp_path / "b", "directory", source, str(tmp_path / "nowhere")).stderr
    (source / "requirements.txt").unlink()
    assert "celeryops_release_requirements" in bundle(tmp_path / "c", "directory", source).stderr


def test_the_wheel_of_the_runtime_matches_its_project_file(tmp_path: Path, source: Path) -> None:
    packs = json.loads(bundle(tmp_path / "out", "directory", source).stdout)
    with tarfile.open(packs["runtime"]["path"]) as tar:
        (member,) = tar.getmembers()
        content = tar.extractfile(member)
        if content is None:
            raise AssertionError(member.name)
        data = content.read()
    wheel = zipfile.ZipFile(io.BytesIO(data))
    inside = set(wheel.namelist())
    expected = {f"celeryops/{path.name}" for path in (TOP / "runtime" / "celeryops").glob("*.py")}
    expected |= {f"celeryops/engine/{path.name}" for path in (TOP / "plugins/module_utils/engine").glob("*.py")}
    assert {name for name in inside if ".dist-info/" not in name} == expected
    metadata = next(wheel.read(name).decode() for name in inside if name.endswith("METADATA"))
    project = (TOP / "runtime" / "pyproject.toml").read_text()
    assert 'dependencies = ["celery>=5.4"]' in project and "Requires-Dist: celery>=5.4" in metadata
    assert 'requires-python = ">=3.10"' in project and "Requires-Python: >=3.10" in metadata
    target = tmp_path / "installed"
    whl = tmp_path / member.name
    whl.write_bytes(data)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index"]
    done = subprocess.run([*pip, "--target", str(target), str(whl)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (target / "celeryops" / "engine" / "control.py").is_file()


# releases on a host


@pytest.fixture
def releases(tmp_path: Path) -> Any:
    found = program("releases").Releases(str(tmp_path))
    for number, release in enumerate(["v1", "v2", "v3", "v4"]):
        (tmp_path / "releases" / release).mkdir(parents=True)
        marker = tmp_path / "releases" / release / ".complete"
        marker.touch()
        os.utime(marker, (1000 + number, 1000 + number))
    (tmp_path / "releases" / "half").mkdir()
    return found


def test_activation_switches_and_logs(releases: Any, tmp_path: Path) -> None:
    assert releases.activate("v1", "me", False) == {"changed": True, "release": "v1", "previous": ""}
    assert releases.activate("v2", "me", False) == {"changed": True, "release": "v2", "previous": "v1"}
    assert releases.activate("v2", "me", False)["changed"] is False
    assert os.readlink(tmp_path / "current") == "releases/v2"
    lines = [json.loads(line) for line in (tmp_path / "activations.log").read_text().splitlines()]
    assert [(line["release"], line["previous"], line["by"]) for line in lines] == [("v1", "", "me"), ("v2", "v1", "me")]
    assert releases.previous() == "v1"


def test_activation_in_check_mode_changes_nothing(releases: Any, tmp_path: Path) -> None:
    assert releases.activate("v9", "me", True)["changed"] is True
    assert not (tmp_path / "current").exists() and not (tmp_path / "activations.log").exists()


def test_a_release_without_its_marker_is_not_activated(releases: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        releases.activate("half", "me", False)
    assert "release half is not on this host; there are: v1, v2, v3, v4" in capsys.readouterr().err


def test_a_directory_in_place_of_current_is_refused(releases: Any, tmp_path: Path) -> None:
    (tmp_path / "current").mkdir()
    with pytest.raises(SystemExit):
        releases.current()


def test_a_torn_line_of_the_log_is_skipped(releases: Any, tmp_path: Path) -> None:
    releases.activate("v1", "me", False)
    releases.activate("v2", "me", False)
    with open(tmp_path / "activations.log", "a") as log:
        log.write('{"time": "2026')
    assert releases.previous() == "v1"


def test_prune_keeps_current_previous_and_the_newest(releases: Any) -> None:
    releases.activate("v1", "me", False)
    releases.activate("v2", "me", False)
    releases.activate("v1", "me", False)
    assert releases.prune(2, True) == {"changed": True, "removed": ["v3", "v4"]}
    assert releases.complete() == ["v1", "v2", "v3", "v4"]
    assert releases.prune(3, False) == {"changed": True, "removed": ["v3"]}
    assert releases.complete() == ["v1", "v2", "v4"]
    assert releases.prune(3, False) == {"changed": False, "removed": []}


def test_prune_spares_a_release_that_a_process_works_in(releases: Any, tmp_path: Path) -> None:
    releases.activate("v3", "me", False)
    releases.activate("v4", "me", False)
    (tmp_path / "releases" / "v1" / "src").mkdir()
    with subprocess.Popen(["sleep", "60"], cwd=tmp_path / "releases" / "v1" / "src") as process:
        try:
            assert releases.prune(2, False)["removed"] == ["v2"]
        finally:
            process.kill()
    assert releases.complete() == ["v1", "v3", "v4"]


def test_what_follows_the_hardening_has_lines_of_its_own() -> None:
    """An include swallows the end of its last line, and systemd leaves out what it cannot read."""
    for path in (TOP / "templates" / "systemd").glob("*.j2"):
        assert not re.search(r"include '_hardening.j2' %}\n(?!\n)", path.read_text()), path.name
    file = {"settings": {"last": "", "extra": ["IPAccounting=yes"]}}
    shown = subprocess.run(
        [
            *(sys.executable, "-m", "ansible", "adhoc", "localhost", "-m", "ansible.builtin.debug"),
            *("-a", "msg={{ lookup('ansible.builtin.template', path) }}", "-o", "-e"),
            json.dumps({"celery_unit_file": file, "path": str(TOP / "templates/systemd/redis-server.conf.j2")}),
        ],
        capture_output=True, text=True, check=True, env={**os.environ, "ANSIBLE_LOCALHOST_WARNING": "0"},
    )  # fmt: skip
    lines = json.loads(shown.stdout.partition("=> ")[2])["msg"].splitlines()
    assert lines.count("UMask=0077") == 1 and "UMask=0027" in lines and "IPAccounting=yes" in lines
