# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""On a host: look at the releases of an application, activate one, remove old ones. Prints JSON.

releases.py ROOT look ID
releases.py ROOT activate ID BY CHECK
releases.py ROOT prune KEEP CHECK
"""

from __future__ import annotations

import datetime
import glob
import json
import os
import shutil
import sys


def stop(message: str) -> None:
    print(message, file=sys.stderr)
    raise SystemExit(1)


class Releases:
    def __init__(self, root: str) -> None:
        self.root = root
        self.folder = os.path.join(root, "releases")
        self.link = os.path.join(root, "current")
        self.log = os.path.join(root, "activations.log")

    def path(self, release: str) -> str:
        return os.path.join(self.folder, release)

    def complete(self) -> list[str]:
        markers = glob.glob(os.path.join(glob.escape(self.folder), "*", ".complete"))
        # Oldest first, by the time of their completion.
        return [os.path.basename(os.path.dirname(m)) for m in sorted(markers, key=lambda m: (os.path.getmtime(m), m))]

    def current(self) -> str:
        if os.path.exists(self.link) and not os.path.islink(self.link):
            stop(f"{self.link} is not a link: move what lies there away, the role puts a link in its place")
        return os.path.basename(os.readlink(self.link)) if os.path.islink(self.link) else ""

    def activations(self) -> list[dict[str, str]]:
        found = []
        if os.path.exists(self.log):
            with open(self.log, encoding="utf-8") as lines:
                for line in lines:
                    try:
                        found.append(json.loads(line))
                    except ValueError:
                        continue  # cut off by a crash
        return found

    def previous(self) -> str:
        current = self.current()
        for entry in reversed(self.activations()):
            if entry.get("release") == current:
                return str(entry.get("previous") or "")
        return ""

    def description(self, release: str) -> dict[str, object]:
        try:
            with open(os.path.join(self.path(release), "release.json"), encoding="utf-8") as handle:
                return dict(json.load(handle))
        except (OSError, ValueError):
            return {}

    def look(self, release: str) -> dict[str, object]:
        shared = os.path.join(self.root, "shared")
        return {
            "current": self.current(),
            "previous": self.previous(),
            "releases": self.complete(),
            "complete": release in self.complete(),
            "source": self.description(release).get("source", {}),
            "kept": [os.path.basename(path) for path in glob.glob(os.path.join(glob.escape(shared), "*-*"))],
        }

    def activate(self, release: str, by: str, check: bool) -> dict[str, object]:
        before = self.current()
        if before == release:
            return {"changed": False, "release": release, "previous": self.previous()}
        if check:
            return {"changed": True, "release": release, "previous": before}
        if release not in self.complete():
            stop(f"release {release} is not on this host; there are: {', '.join(self.complete()) or 'none'}")
        temporary = f"{self.link}.{os.getpid()}"
        os.symlink(os.path.join("releases", release), temporary)
        # The log first: a logged switch that did not happen is repeated, an unlogged one would hide the way back.
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        with open(self.log, "a", encoding="utf-8") as log:
            log.write(json.dumps({"time": now, "release": release, "previous": before, "by": by}) + "\n")
            log.flush()
            os.fsync(log.fileno())
        os.replace(temporary, self.link)
        return {"changed": True, "release": release, "previous": before}

    def in_use(self) -> set[str]:
        """Releases that a process works in, whatever `current` says."""
        found = set()
        for cwd in glob.glob("/proc/[0-9]*/cwd"):
            try:
                place = os.readlink(cwd)
            except OSError:
                continue
            if place.startswith(self.folder + "/"):
                found.add(place[len(self.folder) + 1 :].partition("/")[0])
        return found

    def prune(self, keep: int, check: bool) -> dict[str, object]:
        releases = self.complete()
        held = {self.current(), self.previous(), *self.in_use()}
        spare = [release for release in releases if release not in held]
        surplus = len(releases) - keep
        removed = spare[: max(surplus, 0)]
        for release in [] if check else removed:
            # Without its marker it is no release any more, whenever this is interrupted.
            os.unlink(os.path.join(self.path(release), ".complete"))
            shutil.rmtree(self.path(release))
        return {"changed": bool(removed), "removed": removed}


def main() -> None:
    root, verb, *rest = sys.argv[1:]
    releases = Releases(root)
    if verb == "look":
        answer = releases.look(rest[0])
    elif verb == "activate":
        answer = releases.activate(rest[0], rest[1], rest[2] == "True")
    else:
        answer = releases.prune(int(rest[0]), rest[1] == "True")
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
