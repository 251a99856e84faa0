# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A throw-away authority and what it signs, made with openssl."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Pair:
    certificate: Path
    key: Path

    @property
    def pem(self) -> str:
        return self.certificate.read_text()

    @property
    def secret(self) -> str:
        return self.key.read_text()


class Authority:
    def __init__(self, directory: Path, name: str) -> None:
        self.directory, self.name = directory, name
        directory.mkdir(parents=True, exist_ok=True)
        self.file, self._key = directory / f"{name}.crt", directory / f"{name}.key"
        extensions = ("basicConstraints=critical,CA:TRUE", "keyUsage=critical,keyCertSign,cRLSign")
        self._openssl(
            *("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-batch", "-days", "30", "-subj", f"/CN={name}"),
            *("-keyout", self._key, "-out", self.file),
            *(word for extension in extensions for word in ("-addext", extension)),
        )

    @property
    def pem(self) -> str:
        return self.file.read_text()

    def sign(self, name: str, *names: str, days: int = 20) -> Pair:
        """`names` as in subjectAltName, such as IP:127.0.0.1. With 0 days it has ended."""
        pair = Pair(self.directory / f"{name}.crt", self.directory / f"{name}.key")
        request, extensions = self.directory / f"{name}.csr", self.directory / f"{name}.ext"
        lines = ["basicConstraints=critical,CA:FALSE", "authorityKeyIdentifier=keyid", "subjectKeyIdentifier=hash"]
        extensions.write_text("\n".join([*lines, *([f"subjectAltName={','.join(names)}"] if names else []), ""]))
        self._openssl(
            *("req", "-newkey", "rsa:2048", "-nodes", "-batch", "-subj", f"/CN={name}"),
            *("-keyout", pair.key, "-out", request),
        )
        self._openssl(
            *("x509", "-req", "-in", request, "-CA", self.file, "-CAkey", self._key, "-CAcreateserial"),
            *("-days", str(days), "-extfile", extensions, "-out", pair.certificate),
        )
        return pair

    @staticmethod
    def _openssl(*arguments: str | Path) -> None:
        subprocess.run(["openssl", *arguments], capture_output=True, check=True)
