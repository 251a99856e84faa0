# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The checkout keeps its own rules (scripts/house.py), and each rule finds what it is for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts import bench, checks, house

# PyYAML, git and the checking tools are in .venv.
pytestmark = pytest.mark.ansible
TOP = Path(house.__file__).resolve().parent.parent
ROLE = {
    "roles/queue/README.md": "# queue\n",
    "roles/queue/tasks/main.yml": "---\n",
    "roles/queue/defaults/main.yml": "---\ncelery_queue_size: 1\n",
    "roles/queue/meta/argument_specs.yml": (
        "---\nargument_specs:\n  main:\n    short_description: Queues\n    options:\n"
        "      celery_queue_size:\n        type: int\n        description: How many.\n"
    ),
}
PLAYBOOK = {
    "playbooks/go.yml": "---\n# Purpose: a\n# Precondition: b\n# Blast radius: c\n# Undo: d\n# Variables: e\n",
    "docs/playbooks/go.md": "ansible-playbook celeryops.runbook.go\n",
    "docs/runbooks.md": "| [go](playbooks/go.md) |\n",
    "README.md": "| [go](docs/playbooks/go.md) |\n",
}


def tree(root: Path, content: dict[str, str]) -> Path:
    for name, text in content.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    subprocess.run(["git", "init", "-q", str(root)], check=True)
    return root


@pytest.mark.parametrize("rule", house.RULES, ids=lambda rule: rule.__name__)
def test_the_checkout_keeps_the_rule(rule):
    assert list(rule(TOP)) == []


def test_licence_header_and_future_import_are_missed(tmp_path):
    found = list(house.licence_headers(tree(tmp_path, {"a.py": "x = 1\n", "b": "#!/bin/sh\n", "c.md": "x\n"})))
    assert [line.split(":")[0] for line in found] == ["a.py"] * 4 + ["b"] * 3


@pytest.mark.parametrize("place", ["https://pypi." + "org/simple", "/wo" + "rk/main", "/ro" + "ot/.cache"])
def test_places_of_one_machine_are_found(tmp_path, place):
    root = tree(tmp_path, {"a.txt": f"fine\nsee {place}\n", ".gitignore": "b.txt\n", "b.txt": place})
    assert len(found := list(house.foreign_places(root))) == 1
    assert found[0].startswith("a.txt:2: ")


def test_a_clean_role_passes(tmp_path):
    root = tree(tmp_path, ROLE)
    assert [*house.role_arguments(root), *house.entry_points(root)] == []


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        (
            {"roles/queue/defaults/main.yml": "---\ncelery_queue_size: 1\ncelery_queue_other: 2\n"},
            "celery_queue_other is in defaults",
        ),
        ({"roles/queue/defaults/main.yml": "---\n"}, "celery_queue_size is in the argument specs and not in defaults"),
        ({"roles/other/tasks/main.yml": "---\n"}, "roles/other: has no README.md"),
        ({"roles/other/README.md": "x\n"}, "roles/other: has no meta/argument_specs.yml"),
        (
            {
                "roles/queue/meta/argument_specs.yml": (
                    "---\nargument_specs:\n  main:\n    short_description: Queues\n    options:\n"
                    "      celery_queue_size: {type: int, required: true, default: 1, description: How many.}\n"
                )
            },
            "is required and has a default",
        ),
        (
            {
                "playbooks/go.yml": (
                    "---\n- name: Go\n  hosts: all\n  tasks:\n    - name: Stop\n      ansible.builtin.include_role:\n"
                    "        name: celeryops.runbook.queue\n        tasks_from: stop\n"
                )
            },
            "calls queue/stop, which has no argument spec",
        ),
    ],
)
def test_a_broken_role_is_found(tmp_path, change, finding):
    root = tree(tmp_path, {**ROLE, **change})
    assert finding in "\n".join([*house.role_arguments(root), *house.entry_points(root)])


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        ({}, ""),
        ({"playbooks/go.yml": "---\n# Purpose: a\n"}, "lacks '# Undo: ...'"),
        ({"docs/playbooks/go.md": "x\n"}, "does not show the command celeryops.runbook.go"),
        ({"docs/runbooks.md": "go\n"}, "docs/runbooks.md: no table row links to (playbooks/go.md)"),
        ({"README.md": "go\n"}, "README.md: no table row links to (docs/playbooks/go.md)"),
        ({"docs/playbooks/gone.md": "x\n"}, "gone.md: describes a playbook that does not exist"),
        ({"playbooks/roll-back.yml": "---\n"}, "use lower case and underscores"),
    ],
)
def test_a_playbook_needs_header_page_and_rows(tmp_path, change, finding):
    found = "\n".join(house.playbook_pages(tree(tmp_path, {**PLAYBOOK, **change})))
    assert finding in found
    assert bool(finding) == bool(found)


def test_action_group_and_readme_follow_the_modules(tmp_path):
    root = tree(
        tmp_path,
        {
            "meta/runtime.yml": "---\nrequires_ansible: '>=2.17.0'\naction_groups:\n  celeryops: [gone, local]\n",
            "plugins/modules/here.py": "extends_documentation_fragment:\n  - celeryops.runbook.connection\n",
            "plugins/modules/local.py": "",
            "README.md": "nothing\n",
        },
    )
    found = "\n".join(house.modules_listed(root))
    assert "here takes the connection and is not in the action group" in found
    assert "local does not take the connection" in found
    assert "names gone, which does not exist" in found
    assert "does not name the module here" in found


def test_dead_links_and_unknown_make_targets_are_found(tmp_path):
    root = tree(
        tmp_path,
        {
            "README.md": "[a](docs/no.md) [b](x.md) [c](https://example.org/)\n`make fly`\n",
            "x.md": "",
            "Makefile": ".PHONY: go\ngo:\n",
        },
    )
    assert list(house.links(root)) == ["README.md: the link to docs/no.md leads nowhere"]
    assert "names 'make fly'" in "\n".join(house.make_help(root))
    assert "the target go has no help text" in "\n".join(house.make_help(root))


def test_steps_report_failures_and_unknown_names(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checks, "LOGS", tmp_path)
    steps = [[checks.Step("good", "echo fine", tail=1), checks.Step("bad", "echo broken; exit 3")]]
    monkeypatch.setitem(checks.PLANS, "lint", steps)
    assert checks.main(["lint"]) == 1
    out = capsys.readouterr().out
    assert "FAILED bad (exit 3" in out and "broken" in out and "ok     good" in out and "fine" in out
    assert checks.main(["lint", "good"]) == 0
    assert checks.main(["lint", "typo"]) == 2
    assert "no such step: typo; the steps are: good, bad" in capsys.readouterr().err


def test_an_interrupt_ends_the_steps(tmp_path):
    pid_file = tmp_path / "pid"
    code = (
        "import pathlib, sys\n"
        f"sys.path.insert(0, {str(TOP)!r})\n"
        "from scripts import checks\n"
        f"checks.LOGS = pathlib.Path({str(tmp_path)!r})\n"
        f"checks.PLANS['lint'] = [[checks.Step('long', 'sleep 300 & echo $! > {pid_file}; wait')]]\n"
        "sys.exit(checks.main(['lint']))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    end = time.monotonic() + 20
    while not (pid_file.exists() and pid_file.read_text().strip()):
        assert time.monotonic() < end, "the step did not start"
        time.sleep(0.05)
    pid = int(pid_file.read_text())
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 130
    while time.monotonic() < end + 30:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail("a child of the step is still alive")


def test_benchmark_table_and_refusals(tmp_path):
    good = tmp_path / "bench_good.py"
    entry = {"name": "queue-purge", "baseline": 100.0, "ours": 25.0, "ratio": 4.0, "unit": "s", "conditions": "2 cores"}
    good.write_text(f"import json; print(json.dumps([{entry!r}]))")
    assert bench.run(sys.executable, good) == [entry]
    assert bench.table([entry]).splitlines()[1].split() == ["queue-purge", "100", "25", "4", "s"]
    good.write_text("print('no results')")
    with pytest.raises(ValueError, match="no JSON list"):
        bench.run(sys.executable, good)
    good.write_text('print(\'[{"name": "x"}]\')')
    with pytest.raises(ValueError, match="lacks"):
        bench.run(sys.executable, good)


def test_every_test_file_has_one_environment():
    for path in (TOP / "tests").glob("*/test_*.py"):
        imports_ansible = any(
            line.startswith(("import ansible.", "from ansible.", "import yaml"))
            for line in path.read_text().splitlines()
        )
        marked = "pytestmark = pytest.mark.ansible" in path.read_text()
        assert marked or not imports_ansible, f"{path.name} imports Ansible: mark it `pytestmark = pytest.mark.ansible`"
