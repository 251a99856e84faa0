# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""On the controller: pack what the hosts need to build a release. Prints where the packs lie and their digests.

bundle.py FOLDER COLLECTION TYPE SOURCE REQUIREMENTS WHEELHOUSE
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import sys
import tarfile
import zipfile
from collections.abc import Iterator

LEFT_OUT = {".git", ".hg", ".svn", ".venv", "__pycache__", ".mypy_cache", ".pytest_cache", ".ruff_cache"}
Member = tuple[str, int, bytes]  # path, mode, content


def stop(message: str) -> None:
    print(message, file=sys.stderr)
    raise SystemExit(1)


def from_directory(top: str, prefix: str = "") -> Iterator[Member]:
    paths: list[str] = []
    for folder, subfolders, files in os.walk(top):
        subfolders[:] = [name for name in subfolders if name not in LEFT_OUT and not name.endswith(".egg-info")]
        paths.extend(os.path.join(folder, name) for name in files if not name.endswith(".pyc"))
    for name, path in sorted((os.path.relpath(path, top), path) for path in paths if os.path.isfile(path)):
        with open(path, "rb") as handle:
            yield prefix + name, 0o755 if os.access(path, os.X_OK) else 0o644, handle.read()


def from_archive(path: str) -> Iterator[Member]:
    found: list[Member] = []
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if not info.is_dir():
                    mode = 0o755 if (info.external_attr >> 16) & 0o100 else 0o644
                    found.append((info.filename, mode, archive.read(info)))
    elif tarfile.is_tarfile(path):
        with tarfile.open(path) as archive:
            for member in archive:
                content = archive.extractfile(member) if member.isfile() else None
                if content:
                    found.append((member.name, 0o755 if member.mode & 0o100 else 0o644, content.read()))
                elif not member.isdir():
                    stop(f"celeryops_release_src: {path} holds {member.name}, which is neither a file nor a directory")
    else:
        stop(f"celeryops_release_src: {path} is neither a tar nor a zip archive")
    found = [(os.path.normpath(name), mode, content) for name, mode, content in found]
    outside = [name for name, _unused, _unused in found if name.startswith(("/", "../")) or name == ".."]
    if outside:
        stop(f"celeryops_release_src: {path} holds {outside[0]}, which points out of the archive")
    tops = {name.partition("/")[0] for name, _unused, _unused in found}
    if len(tops) == 1 and all("/" in name for name, _unused, _unused in found):
        # Packed with its folder, as most hosting services do.
        found = [(name.partition("/")[2], mode, content) for name, mode, content in found]
    yield from sorted(found)


def pack(folder: str, kind: str, members: Iterator[Member], compress: bool) -> dict[str, str]:
    digest = hashlib.sha256()
    partial = os.path.join(folder, f"{kind}.partial")
    with tarfile.open(partial, "w:gz", compresslevel=3) if compress else tarfile.open(partial, "w") as tar:
        for name, mode, content in members:
            digest.update(f"{name}\0{mode:o}\0{len(content)}\0".encode() + content)
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(content), mode
            tar.addfile(info, io.BytesIO(content))
    identity = digest.hexdigest()[:16]
    path = os.path.join(folder, f"{kind}-{identity}.tar")
    os.replace(partial, path)
    return {"kind": kind, "digest": identity, "path": path}


def runtime(folder: str, collection: str) -> dict[str, str]:
    """The wheel of the runtime package. Pure Python, so it is put together here and no host needs build tools."""
    tops = {"celeryops": "runtime/celeryops", "celeryops/engine": "plugins/module_utils/engine"}
    files: dict[str, bytes] = {}
    for package, place in tops.items():
        for name, _mode, content in from_directory(os.path.join(collection, place), f"{package}/"):
            if name.endswith((".py", "/py.typed")):
                files[name] = content
    found = re.search(rb'^__version__ = "([^"]+)"', files["celeryops/__init__.py"], re.M)
    version = found.group(1).decode() if found else "0"
    with open(os.path.join(collection, "runtime", "pyproject.toml"), encoding="utf-8") as handle:
        project = handle.read()
    needs = re.findall(r'"([^"]+)"', re.findall(r"^dependencies = (\[.*\])$", project, re.M)[0])
    python = re.findall(r'^requires-python = "([^"]+)"$', project, re.M)[0]
    info = f"celeryops-{version}.dist-info"
    metadata = ["Metadata-Version: 2.1", "Name: celeryops", f"Version: {version}", f"Requires-Python: {python}"]
    metadata += [f"Requires-Dist: {need}" for need in needs]
    files[f"{info}/METADATA"] = ("\n".join(metadata) + "\n").encode()
    wheel = "Wheel-Version: 1.0\nGenerator: celeryops.runbook\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files[f"{info}/WHEEL"] = wheel.encode()
    record = ""
    for name, content in sorted(files.items()):
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        record += f"{name},sha256={digest},{len(content)}\n"
    files[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
    wheel = io.BytesIO()
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in sorted(files.items()):
            entry = zipfile.ZipInfo(name, (2026, 1, 1, 0, 0, 0))
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, content, zipfile.ZIP_DEFLATED)
    # Packed, so that its digest names it on the hosts like every other pack.
    return pack(folder, "runtime", iter([(f"celeryops-{version}-py3-none-any.whl", 0o644, wheel.getvalue())]), False)


def main() -> None:
    folder, collection, kind, source, requirements, wheelhouse = sys.argv[1:]
    os.makedirs(folder, exist_ok=True)
    packs = [runtime(folder, collection)]
    if wheelhouse:
        if not os.path.isdir(wheelhouse):
            stop(f"celeryops_wheelhouse: {wheelhouse} is not a directory on the controller")
        packs.append(pack(folder, "wheelhouse", from_directory(wheelhouse), False))
    if kind == "directory":
        if not os.path.isdir(source):
            stop(f"celeryops_release_src: {source} is not a directory on the controller")
        packs.append(pack(folder, "source", from_directory(source), True))
    elif kind == "archive":
        if not os.path.isfile(source):
            stop(f"celeryops_release_src: {source} is not a file on the controller")
        packs.append(pack(folder, "source", from_archive(source), True))
    for one in packs:
        if one["kind"] == "source":
            with tarfile.open(one["path"]) as tar:
                if requirements not in tar.getnames():
                    stop(f"celeryops_release_requirements: {source} holds no {requirements}")
    print(json.dumps({one["kind"]: one for one in packs}))


if __name__ == "__main__":
    main()
