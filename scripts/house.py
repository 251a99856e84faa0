# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The rules of this checkout that no public tool knows. Prints one line a finding: `path: what is wrong and the cure`.

tests/unit/test_house.py runs them on the checkout and proves on broken trees that each one finds what it is for.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

LICENCE = (
    "Copyright: (c) 2026, celeryops contributors",
    "GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)",
    "SPDX-License-Identifier: GPL-3.0-or-later",
)
# In pieces, so that this file passes its own rule.
FOREIGN = re.compile(
    "|".join(
        [
            r"pypi\." + r"org",
            "python" + "hosted",
            r"deb\." + r"debian\.org",
            r"registry\." + r"npmjs",
            "/wo" + "rk/",
            r"/ro" + r"ot/\.(?!ssh/|ansible/)",
            "/tmp/" + "lab",
        ]
    )
)
HEADER_FIELDS = ("Purpose", "Precondition", "Blast radius", "Undo", "Variables")
NOT_ONE_FILE = {"COPYING"}


def files(root: Path) -> list[Path]:
    listed = subprocess.run(
        ["git", "-C", str(root), "ls-files", "-z", "-co", "--exclude-standard", "--deduplicate"],
        check=True,
        capture_output=True,
    ).stdout.decode()
    paths = (root / name for name in listed.split("\0") if name)
    return sorted(path for path in paths if path.is_file() and not path.is_symlink())


def text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def load(path: Path) -> Any:
    return yaml.safe_load(text(path)) if path.is_file() else None


def names(root: Path, pattern: str) -> list[str]:
    return sorted(path.stem for path in root.glob(pattern) if path.stem != "__init__")


def licence_headers(root: Path) -> Iterator[str]:
    for path in files(root):
        script = path.suffix == "" and text(path).startswith("#!")
        if (path.suffix not in (".py", ".sh") and not script) or not text(path).strip():
            continue
        head = text(path).splitlines()[:10]
        for line in LICENCE:
            if f"# {line}" not in head:
                yield f"{path.relative_to(root)}: the header lacks the line '# {line}'"
        if path.suffix == ".py" and "from __future__ import annotations" not in text(path):
            yield f"{path.relative_to(root)}: lacks 'from __future__ import annotations'"


def foreign_places(root: Path) -> Iterator[str]:
    """Hosts of package registries and paths of one machine have no place in the repository."""
    for path in files(root):
        if path.name in NOT_ONE_FILE:
            continue
        for number, line in enumerate(text(path).splitlines(), 1):
            found = FOREIGN.search(line)
            if found:
                yield f"{path.relative_to(root)}:{number}: names {found.group()!r}; leave it to the machine's settings"


def options(spec: dict[str, Any]) -> set[str]:
    return {name for entry in (spec.get("argument_specs") or {}).values() for name in (entry.get("options") or {})}


def role_arguments(root: Path) -> Iterator[str]:
    """Each role: a README, argument specs for every entry point, and the same names in specs and defaults."""
    for role in sorted(path for path in (root / "roles").glob("*") if path.is_dir()):
        place = role.relative_to(root)
        if not (role / "README.md").is_file():
            yield f"{place}: has no README.md"
        spec = load(role / "meta" / "argument_specs.yml")
        if not spec:
            yield f"{place}: has no meta/argument_specs.yml"
            continue
        defaults = set(load(role / "defaults" / "main.yml") or {})
        required = {
            name
            for entry in spec["argument_specs"].values()
            for name, option in (entry.get("options") or {}).items()
            if option.get("required")
        }
        for entry, content in spec["argument_specs"].items():
            if not (role / "tasks" / f"{entry}.yml").is_file():
                yield f"{place}: argument_specs describes the entry point {entry}, tasks/{entry}.yml does not exist"
            if not content.get("short_description"):
                yield f"{place}: the entry point {entry} has no short_description"
            for name, option in (content.get("options") or {}).items():
                if option.get("required") and "default" in option:
                    yield f"{place}: {entry}: {name} is required and has a default"
                if not option.get("description"):
                    yield f"{place}: {entry}: {name} has no description"
        public = {name for name in options(spec) if name.startswith("celery_")}
        for name in sorted(defaults - options(spec)):
            yield f"{place}: {name} is in defaults/main.yml and in no argument spec"
        for name in sorted(public - defaults - required):
            yield f"{place}: {name} is in the argument specs and not in defaults/main.yml"


def entry_points(root: Path) -> Iterator[str]:
    """Whatever a playbook or another role calls with tasks_from is a public entry point and has a spec."""
    call = re.compile(r"celeryops\.runbook\.(\w+)")
    for path in [*root.glob("playbooks/**/*.yml"), *root.glob("roles/*/tasks/**/*.yml")]:
        for task in walk(load(path)):
            arguments = task.get("ansible.builtin.include_role") or task.get("ansible.builtin.import_role")
            if not isinstance(arguments, dict):
                continue
            found = call.fullmatch(str(arguments.get("name", "")))
            entry = str(arguments.get("tasks_from", "main")).removesuffix(".yml")
            if not found or "{" in entry:
                continue
            spec = load(root / "roles" / found.group(1) / "meta" / "argument_specs.yml") or {}
            if entry not in (spec.get("argument_specs") or {}):
                yield f"{path.relative_to(root)}: calls {found.group(1)}/{entry}, which has no argument spec"


def walk(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        yield node
        node = list(node.values())
    if isinstance(node, list):
        for item in node:
            yield from walk(item)


def playbook_pages(root: Path) -> Iterator[str]:
    """Each playbook: a header with its five fields, a page, a row in docs/runbooks.md and in README.md."""
    index, readme = root / "docs" / "runbooks.md", root / "README.md"
    for name in names(root, "playbooks/*.yml"):
        place = f"playbooks/{name}.yml"
        content = text(root / place)
        header = [line[1:].strip() for line in content.splitlines() if line.startswith("#")]
        for field in HEADER_FIELDS:
            if not any(line.startswith(f"{field}:") for line in header):
                yield f"{place}: the header comment lacks '# {field}: ...'"
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            yield f"{place}: use lower case and underscores, or celeryops.runbook.{name} cannot be called"
        page = root / "docs" / "playbooks" / f"{name}.md"
        if not page.is_file():
            yield f"{place}: has no page docs/playbooks/{name}.md"
        elif f"celeryops.runbook.{name}" not in text(page):
            yield f"docs/playbooks/{name}.md: does not show the command celeryops.runbook.{name}"
        for table, link in ((index, f"(playbooks/{name}.md)"), (readme, f"(docs/playbooks/{name}.md)")):
            rows = [line for line in (text(table).splitlines() if table.is_file() else []) if line.startswith("|")]
            if not any(link in row for row in rows):
                yield f"{table.relative_to(root)}: no table row links to {link}"
    for page in sorted((root / "docs" / "playbooks").glob("*.md")):
        if not (root / "playbooks" / f"{page.stem}.yml").is_file():
            yield f"{page.relative_to(root)}: describes a playbook that does not exist"


def modules_listed(root: Path) -> Iterator[str]:
    """The action group holds the modules that take the connection, README.md names every module and role."""
    runtime = load(root / "meta" / "runtime.yml") or {}
    group = set((runtime.get("action_groups") or {}).get("celeryops") or [])
    modules = set(names(root, "plugins/modules/*.py"))
    connecting = {
        name
        for name in modules
        if "- celeryops.runbook.connection" in text(root / "plugins" / "modules" / f"{name}.py")
    }
    for name in sorted(connecting - group):
        yield f"meta/runtime.yml: the module {name} takes the connection and is not in the action group celeryops"
    for name in sorted(group & modules - connecting):
        yield f"meta/runtime.yml: {name} does not take the connection; module_defaults of the group would break it"
    for name in sorted(group - modules):
        yield f"meta/runtime.yml: the action group celeryops names {name}, which does not exist"
    readme = text(root / "README.md") if (root / "README.md").is_file() else ""
    for name in sorted(modules):
        if f"`{name}`" not in readme:
            yield f"README.md: does not name the module {name}"
    for role in sorted(path.name for path in (root / "roles").glob("*") if path.is_dir()):
        if not role.startswith("_") and f"(roles/{role}/README.md)" not in readme:
            yield f"README.md: does not link to the role {role}"
    if runtime.get("requires_ansible") != ">=2.17.0":
        yield "meta/runtime.yml: requires_ansible must be '>=2.17.0'"


def links(root: Path) -> Iterator[str]:
    """Relative links of the documents lead somewhere."""
    for path in files(root):
        if path.suffix != ".md":
            continue
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text(path)):
            if re.match(r"[a-z]+:", target):
                continue
            if not (path.parent / target).exists():
                yield f"{path.relative_to(root)}: the link to {target} leads nowhere"


def make_help(root: Path) -> Iterator[str]:
    """Each target of the Makefile that is for people has a help line, and README or docs name no other target."""
    content = text(root / "Makefile") if (root / "Makefile").is_file() else ""
    phony = {name for line in re.findall(r"^\.PHONY:(.*)$", content, re.M) for name in line.split()}
    helped = set(re.findall(r"^([a-z][a-z-]*):.*?## \S", content, re.M))
    for name in sorted(phony - helped):
        yield f"Makefile: the target {name} has no help text ('{name}: ... ## text')"
    for path in files(root):
        if path.suffix == ".md" and path.name != "CHANGELOG.md":
            for name in re.findall(r"`make ([a-z][a-z-]*)", text(path)):
                if name not in helped:
                    yield f"{path.relative_to(root)}: names 'make {name}', which the Makefile does not have"


RULES: tuple[Callable[[Path], Iterable[str]], ...] = (
    licence_headers,
    foreign_places,
    role_arguments,
    entry_points,
    playbook_pages,
    modules_listed,
    links,
    make_help,
)


def main() -> int:
    root = Path(__file__).resolve().parent.parent
    findings = [finding for rule in RULES for finding in rule(root)]
    for finding in findings:
        print(finding)
    print(f"{len(RULES)} rules, {len(findings)} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
