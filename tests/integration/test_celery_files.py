# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""celery_files on this machine: what it writes, what it says, and what it leaves alone."""

from __future__ import annotations

import grp
import os
import pwd
from pathlib import Path
from typing import Any

import pytest

from support import Ansible

pytestmark = pytest.mark.ansible

OWN = {"owner": pwd.getpwuid(os.getuid()).pw_name, "group": grp.getgrgid(os.getgid()).gr_name}
PASSWORD = "a-password-that-nobody-is-shown"


@pytest.fixture
def files(ansible: Ansible) -> Any:
    def run(*tasks: list[dict[str, Any]], **options: Any) -> list[dict[str, Any]]:
        modules = [{"files": [{**OWN, **one} for one in task]} for task in tasks]
        return ansible.play([{"celeryops.runbook.celery_files": module} for module in modules], **options)

    return run


def test_many_files_in_one_task_and_again(files: Any, ansible: Ansible, tmp_path: Path) -> None:
    place = tmp_path / "a" / "b"
    old = tmp_path / "old"
    old.write_text("x")
    wanted = [
        {"path": str(place / "secret.env"), "secret": f'PASSWORD="{PASSWORD}"\n', "mode": "0600"},
        {"path": str(place), "state": "directory", "mode": "0750"},
        {"path": str(place / "launch"), "content": "#!/bin/sh\n", "mode": "0755"},
        {"path": str(old), "state": "absent"},
    ]
    (foreseen,) = files(wanted, check=True)
    assert foreseen["changed"] and not place.exists() and old.exists()
    first, second = files(wanted, wanted)
    assert foreseen["paths"] == first["paths"]
    assert sorted(first["paths"]) == sorted(one["path"] for one in wanted)
    assert foreseen["diff"] == first["diff"] and PASSWORD not in ansible.output
    assert {"prepared": f"{old}: removed\n"} in first["diff"]
    assert "#!/bin/sh\n" in [one.get("after") for one in first["diff"]]
    assert not second["changed"] and second["paths"] == [] and second["diff"] == []
    assert (place / "secret.env").read_text() == f'PASSWORD="{PASSWORD}"\n' and not old.exists()
    modes = {path.name: path.stat().st_mode & 0o777 for path in (place, place.parent, *place.iterdir())}
    assert modes == {"b": 0o750, "a": 0o750, "secret.env": 0o600, "launch": 0o755}


def test_mode_alone_and_a_link(files: Any, tmp_path: Path) -> None:
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_text("same\n")
    file.chmod(0o600)
    link.symlink_to(file)
    wanted = [{"path": str(path), "content": "same\n"} for path in (file, link)]
    (done,) = files(wanted)
    assert sorted(done["paths"]) == [str(file), str(link)]
    assert {"prepared": f"{file}: other owner, group or mode\n"} in done["diff"]
    assert file.stat().st_mode & 0o777 == 0o644 and not link.is_symlink() and link.read_text() == "same\n"


def test_the_time_of_the_old_file_is_kept_on_request(files: Any, tmp_path: Path) -> None:
    kept, other, new = (tmp_path / name for name in ("kept", "other", "new"))
    for file in (kept, other):
        file.write_text("old")
        os.utime(file, (1, 1))
    files([{"path": str(file), "content": "new", "keep_time": file != other} for file in (kept, other, new)])
    assert [file.read_text() for file in (kept, other, new)] == ["new"] * 3
    assert kept.stat().st_mtime == 1 and other.stat().st_mtime > 1 and new.stat().st_mtime > 1


def test_one_refused_file_stops_all(files: Any, tmp_path: Path) -> None:
    good, bad, old = (tmp_path / name for name in ("good", "bad", "old"))
    bad.write_text("before\n")
    old.touch()
    before = sorted(tmp_path.iterdir())
    validate = "/bin/sh -c 'grep -q right %s || { echo no right word >&2; exit 1; }'"
    (refused,) = files(
        [
            {"path": str(good), "content": "right\n", "validate": validate},
            {"path": str(bad), "content": "wrong\n", "validate": validate},
            {"path": str(old), "state": "absent"},
        ]
    )
    assert refused["failed"] and refused["msg"] == f"{bad} was refused: no right word"
    assert bad.read_text() == "before\n" and not good.exists()
    assert [path for path in before if not path.exists()] == []
    assert not list(tmp_path.glob(".celeryops-*"))


def test_what_cannot_be_is_refused_with_its_name(files: Any, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    both, neither, odd, folder, relative, nowhere = files(
        [{"path": str(file), "content": "a", "secret": PASSWORD}],
        [{"path": str(file)}],
        [{"path": str(file), "state": "absent", "content": "a"}],
        [{"path": str(tmp_path), "content": "a"}],
        [{"path": "file", "content": "a"}],
        [{"path": str(tmp_path / "none" / "file"), "content": "a"}],
    )
    assert both["msg"] == neither["msg"] == f"files: give {file} exactly one of content and secret."
    assert odd["msg"] == f"files: give {file} no content, since it is absent."
    assert folder["msg"] == f"{tmp_path} is a directory: move it out of the way."
    assert "absolute" in relative["msg"] and str(tmp_path / "none") in nowhere["msg"]
    assert file.read_text() == ""
