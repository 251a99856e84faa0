#!/usr/bin/env python
# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Real systemd hosts in podman, for the demo, Molecule and the tests.

fleet.py up NAME [--hosts redis1,worker1,worker2]   (again from nothing; --keep reuses a fleet that is up)
fleet.py reboot NAME HOST                           (the host keeps its disk)
fleet.py kill NAME HOST                             (it is gone at once, until reboot)
fleet.py cut NAME HOST OTHER, fleet.py join ...     (HOST reaches OTHER no more; packets are lost without a word)
fleet.py mount NAME HOST DIRECTORY, unmount ...     (an empty file system of 64 MB)
fleet.py memory NAME HOST UNIT MEGABYTES            (the kernel gives the unit's processes so much more, 0: as before)
fleet.py down NAME | --all
fleet.py status [--json]

up writes tests/output/fleet/NAME/{inventory.yml,id_ed25519,ssh_config} and prints the inventory's path.
The groups follow the host names: redis* -> redis, worker* -> workers, beat* -> beat (else the first worker is
the beat host too), anything else -> a group named like the host without its number.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import fcntl
import hashlib
import ipaddress
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TOP = Path(__file__).resolve().parents[2]
OUTPUT = TOP / "tests" / "output" / "fleet"
CHECKOUT = hashlib.sha256(str(TOP).encode()).hexdigest()[:8]
LABEL_CHECKOUT = "celeryops.checkout"
LABEL_FLEET = "celeryops.fleet"
NAME = re.compile(r"[a-z][a-z0-9-]{0,20}")
DEFAULT_HOSTS = "redis1,worker1,worker2"
BOOT_TIMEOUT = 60.0
PLURALS = {"worker": "workers"}


class FleetError(Exception):
    """Shown to the user as one line."""


def run(*args: str, check: bool = True, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(args, capture_output=True, text=True, timeout=timeout, check=False)
    if check and done.returncode:
        raise FleetError(
            f"{' '.join(args[:3])} failed ({done.returncode}): {done.stderr.strip() or done.stdout.strip()}"
        )
    return done


def podman(*args: str, check: bool = True, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    return run("podman", *args, check=check, timeout=timeout)


def require() -> None:
    if os.geteuid() != 0:
        raise FleetError("the test hosts run systemd in podman and need root: run this as root (sudo make ...)")
    missing = [tool for tool in ("podman", "runc", "mmdebstrap", "ssh", "ssh-keygen") if not shutil.which(tool)]
    if missing:
        raise FleetError(
            f"not installed: {', '.join(missing)}; run: apt-get install podman runc mmdebstrap openssh-client"
        )
    os.environ.setdefault("CONTAINERS_CONF", str(TOP / "tests" / "image" / "containers.conf"))


def prefix(name: str) -> str:
    return f"celeryops-{CHECKOUT}-{name}"


def build_image() -> str:
    done = subprocess.run([str(TOP / "tests/image/build.sh")], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise FleetError(f"the image was not built: tests/image/build.sh ended with {done.returncode}")
    return done.stdout.strip()


def containers(name: str | None = None) -> list[dict[str, str]]:
    """Every container of this checkout (of one fleet), whatever its state."""
    filters = ["--filter", f"label={LABEL_CHECKOUT}={CHECKOUT}"]
    if name:
        filters += ["--filter", f"label={LABEL_FLEET}={name}"]
    found = json.loads(podman("ps", "-a", *filters, "--format", "json").stdout or "[]")
    return [
        {
            "container": c["Names"][0],
            "fleet": c["Labels"][LABEL_FLEET],
            "host": c["Labels"].get("celeryops.host", ""),
            "ip": c["Labels"].get("celeryops.ip", ""),
            "state": c["State"],
        }
        for c in found
    ]


def networks(name: str | None = None) -> list[str]:
    filters = ["--filter", f"label={LABEL_CHECKOUT}={CHECKOUT}"]
    if name:
        filters += ["--filter", f"label={LABEL_FLEET}={name}"]
    return podman("network", "ls", "-q", *filters).stdout.split()


def groups_of(hosts: list[str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {"redis": [], "workers": [], "beat": []}
    for host in hosts:
        stem = re.sub(r"[0-9]+$", "", host)
        groups.setdefault(PLURALS.get(stem, stem), []).append(host)
    if not groups["beat"]:
        groups["beat"] = groups["workers"][:1]
    return groups


def write_files(name: str, addresses: dict[str, str]) -> Path:
    """Write the inventory and the ssh configuration."""
    folder = OUTPUT / name
    # A new name for every fleet: a master connection left over from an earlier fleet of the same addresses would hang.
    sockets = Path(tempfile.gettempdir()) / f"celeryops-{CHECKOUT}-{secrets.token_hex(4)}"
    lines = ["---", "all:", "  hosts:", "    localhost:", "      ansible_connection: local"]
    lines += [
        '      ansible_python_interpreter: "{{ ansible_playbook_python }}"',
        "  children:",
        "    fleet:",
        "      vars:",
    ]
    lines += [
        "        ansible_user: root",
        "        ansible_python_interpreter: /usr/bin/python3",
        # No templates here: each task would compile them anew for each host.
        f'        ansible_ssh_common_args: -F "{folder}/ssh_config"',
        "        ansible_ssh_args: -o ControlMaster=auto -o ControlPersist=120s",
        f"        ansible_control_path_dir: {sockets}",
        "        ansible_pipelining: true",
        "      hosts:",
    ]
    lines += [f"        {host}: {{ansible_host: {ip}}}" for host, ip in addresses.items()]
    for group, members in groups_of(list(addresses)).items():
        lines += (
            [f"    {group}:"] + (["      hosts:"] if members else []) + [f"        {member}:" for member in members]
        )
    (folder / "inventory.yml").write_text("\n".join(lines) + "\n")
    config = [
        "Host *",
        "  User root",
        f"  IdentityFile {folder}/id_ed25519",
        "  IdentitiesOnly yes",
        "  StrictHostKeyChecking no",
        "  UserKnownHostsFile /dev/null",
        "  LogLevel ERROR",
        "  ServerAliveInterval 5",
        "  ServerAliveCountMax 6",
    ]
    for host, ip in addresses.items():
        config += [f"Host {host}", f"  HostName {ip}"]
    (folder / "ssh_config").write_text("\n".join(config) + "\n")
    (folder / "sockets").write_text(f"{sockets}\n")
    return folder / "inventory.yml"


def end_masters(name: str) -> None:
    """End the ssh masters of a fleet while their hosts still answer."""
    sockets = Path((OUTPUT / name / "sockets").read_text().strip())
    for socket in sockets.glob("*") if sockets.is_dir() else []:
        run("ssh", "-o", f"ControlPath={socket}", "-O", "exit", "fleet", check=False, timeout=10)


def close_connections(name: str) -> None:
    record = OUTPUT / name / "sockets"
    if not record.exists():
        return
    end_masters(name)
    shutil.rmtree(record.read_text().strip(), ignore_errors=True)
    record.unlink()


def remove(name: str) -> int:
    """Remove what a fleet left, complete or not; say how many hosts that were."""
    close_connections(name)
    found = [c["container"] for c in containers(name)]
    if found:
        podman("rm", "-f", "-i", "-v", "-t", "0", *found)
    for network in networks(name):
        podman("network", "rm", "-f", network)
    shutil.rmtree(OUTPUT / name, ignore_errors=True)
    return len(found)


def start_host(name: str, host: str, ip: str, image: str, addresses: dict[str, str]) -> None:
    # Started afresh each time: the mounts are those which exist on this machine.
    volumes = ["-v", f"{OUTPUT / name}/id_ed25519.pub:/root/.ssh/authorized_keys:ro"]
    for path in ("/etc/ssl/certs", "/etc/pip.conf"):
        if os.path.exists(path):
            volumes += ["-v", f"{path}:{path}:ro"]
    labels = {LABEL_CHECKOUT: CHECKOUT, LABEL_FLEET: name, "celeryops.host": host, "celeryops.ip": ip}
    # A host that boots again is reached by the others at once, as a real one with its network card.
    card = "02:42:" + ipaddress.ip_address(ip).packed.hex(":")
    podman(
        *("run", "-d", "--name", f"{prefix(name)}-{host}", "--hostname", host, "--systemd=always"),
        *("--network", prefix(name), "--ip", ip, "--mac-address", card),
        # The playbook game_day cuts the network from within, as it does on a real host.
        *("--cap-add", "NET_ADMIN"),
        *(arg for key, value in labels.items() for arg in ("--label", f"{key}={value}")),
        *(arg for other, other_ip in addresses.items() for arg in ("--add-host", f"{other}:{other_ip}")),
        *volumes,
        image,
    )


def wait_for_boot(name: str, host: str) -> None:
    end = time.monotonic() + BOOT_TIMEOUT
    state = ""
    while time.monotonic() < end:
        done = podman("exec", f"{prefix(name)}-{host}", "systemctl", "is-system-running", "--wait", check=False)
        state = done.stdout.strip()
        if state in ("running", "degraded"):
            break
        time.sleep(0.2)
    if state != "running":
        failed = podman(
            "exec", f"{prefix(name)}-{host}", "systemctl", "--failed", "--plain", "--no-legend", check=False
        )
        raise FleetError(f"host {host} did not boot: state {state or 'unknown'!r} {failed.stdout.strip()}")
    ask = ("ssh", "-F", str(OUTPUT / name / "ssh_config"), host, "true")
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            if not run(*ask, check=False, timeout=10).returncode:
                return
        if time.monotonic() > end:
            raise FleetError(f"host {host} booted but does not answer over ssh")
        time.sleep(0.2)


def reboot(name: str, host: str) -> None:
    if host not in {c["host"] for c in containers(name)}:
        raise FleetError(f"fleet {name} has no host {host}")
    end_masters(name)
    podman("restart", "-t", "30", f"{prefix(name)}-{host}")
    wait_for_boot(name, host)


def kill(name: str, host: str) -> None:
    podman("kill", "-s", "KILL", f"{prefix(name)}-{host}")


def route(name: str, host: str, other: str, verb: str) -> None:
    """Into the host's network from outside, whatever the host has installed."""
    address = next(c["ip"] for c in containers(name) if c["host"] == other)
    pid = podman("inspect", "--format", "{{.State.Pid}}", f"{prefix(name)}-{host}").stdout.strip()
    run("nsenter", "-t", pid, "-n", "ip", "route", verb, "blackhole", f"{address}/32")


def mount(name: str, host: str, directory: str, verb: str) -> None:
    """From outside: inside nobody may mount."""
    pid = podman("inspect", "--format", "{{.State.Pid}}", f"{prefix(name)}-{host}").stdout.strip()
    small = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", directory]
    run("nsenter", "-t", pid, "-m", *(small if verb == "mount" else ["umount", directory]))


def memory(name: str, host: str, unit: str, megabytes: int) -> None:
    """A bound that the kernel keeps. Within the host systemd has none to give where cgroups are those of version 1."""
    container = f"{prefix(name)}-{host}"
    if Path("/sys/fs/cgroup/cgroup.controllers").exists():
        shown = podman("exec", container, "systemctl", "show", "-P", "MemoryCurrent", unit).stdout.strip()
        bound = f"{int(shown) + megabytes * 2**20}" if megabytes else "infinity"
        podman("exec", container, "systemctl", "set-property", "--runtime", unit, f"MemoryMax={bound}")
        return
    top = Path("/sys/fs/cgroup/memory")
    own = top / f"{container}-{unit}"
    if megabytes:
        own.mkdir(exist_ok=True)
        # Only what is asked for from now on counts.
        (own / "memory.limit_in_bytes").write_text(str(megabytes * 2**20))
        group = podman("exec", container, "systemctl", "show", "-P", "ControlGroup", unit).stdout.strip()
        inside = podman("exec", container, "cat", f"/sys/fs/cgroup/systemd{group}/cgroup.procs").stdout.split()
        pairs = (line.split() for line in podman("top", container, "pid", "hpid").stdout.splitlines()[1:])
        for pid in [outside for pid, outside in pairs if pid in inside]:
            (own / "cgroup.procs").write_text(pid)
        return
    if own.is_dir():
        main = podman("inspect", "--format", "{{.State.Pid}}", container).stdout.strip()
        lines = Path(f"/proc/{main}/cgroup").read_text().splitlines()
        home = next(line.split(":", 2)[2] for line in lines if line.split(":")[1] == "memory")
        for pid in (own / "cgroup.procs").read_text().split():
            (top / home.lstrip("/") / "cgroup.procs").write_text(pid)
        own.rmdir()


def addresses_in(subnet: str, hosts: list[str]) -> dict[str, str]:
    network = ipaddress.ip_network(subnet)
    return {host: str(network[11 + number]) for number, host in enumerate(hosts)}


def is_up(name: str, hosts: list[str]) -> bool:
    running = {c["host"] for c in containers(name) if c["state"] == "running"}
    return running == set(hosts) and (OUTPUT / name / "inventory.yml").exists()


def up(name: str, hosts: list[str], keep: bool) -> Path:
    if keep and is_up(name, hosts):
        return OUTPUT / name / "inventory.yml"
    image = build_image()
    remove(name)
    folder = OUTPUT / name
    try:
        folder.mkdir(parents=True)
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", prefix(name), "-f", str(folder / "id_ed25519"))
        podman(
            *("network", "create", "--label", f"{LABEL_CHECKOUT}={CHECKOUT}", "--label", f"{LABEL_FLEET}={name}"),
            prefix(name),
        )
        facts = json.loads(podman("network", "inspect", prefix(name)).stdout)[0]
        # podman 4 with netavark, and with CNI
        subnet = (
            facts["subnets"][0]["subnet"]
            if "subnets" in facts
            else facts["plugins"][0]["ipam"]["ranges"][0][0]["subnet"]
        )
        addresses = addresses_in(subnet, hosts)
        inventory = write_files(name, addresses)
        with concurrent.futures.ThreadPoolExecutor(max_workers=3) as pool:
            list(pool.map(lambda h: start_host(name, h, addresses[h], image, addresses), hosts))
            list(pool.map(lambda h: wait_for_boot(name, h), hosts))
    except BaseException:
        remove(name)
        raise
    return inventory


def locked(name: str) -> int:
    OUTPUT.mkdir(parents=True, exist_ok=True)
    handle = os.open(OUTPUT / f".{name}.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    fcntl.flock(handle, fcntl.LOCK_EX)
    return handle


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("up", help="start a fleet")
    verb.add_argument("name")
    verb.add_argument("--hosts", default=DEFAULT_HOSTS, help=f"comma list (default {DEFAULT_HOSTS})")
    verb.add_argument("--keep", action="store_true", help="reuse the fleet if all its hosts are running")
    verb = verbs.add_parser("reboot", help="stop a host and boot it again")
    verb.add_argument("name")
    verb.add_argument("host")
    verb = verbs.add_parser("kill", help="a host is gone at once, until it is booted again")
    verb.add_argument("name")
    verb.add_argument("host")
    for name, text in (("cut", "a host reaches another no more"), ("join", "it does again")):
        verb = verbs.add_parser(name, help=text)
        verb.add_argument("name")
        verb.add_argument("host")
        verb.add_argument("other")
    for name, text in (("mount", "an empty file system of 64 MB"), ("unmount", "it is gone")):
        verb = verbs.add_parser(name, help=text)
        verb.add_argument("name")
        verb.add_argument("host")
        verb.add_argument("directory")
    verb = verbs.add_parser("memory", help="bound what the processes of a unit may take")
    verb.add_argument("name")
    verb.add_argument("host")
    verb.add_argument("unit")
    verb.add_argument("megabytes", type=int)
    verb = verbs.add_parser("down", help="remove a fleet, or what is left of it")
    verb.add_argument("name", nargs="?")
    verb.add_argument("--all", action="store_true", help="every fleet of this checkout")
    verb = verbs.add_parser("status", help="list the hosts of this checkout")
    verb.add_argument("--json", action="store_true")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        require()
        if args.verb == "status":
            found = containers()
            if args.json:
                print(json.dumps(found, indent=2))
            else:
                for c in found:
                    print(f"{c['fleet']:16} {c['host']:12} {c['ip']:16} {c['state']}")
                if not found:
                    print("no fleet of this checkout is up")
            return 0
        if args.verb == "down" and bool(args.name) == args.all:
            parser.error("down: give either a fleet's name or --all")
        if args.verb == "down" and args.all:
            known = {c["fleet"] for c in containers()} | {n.removeprefix(prefix("")) for n in network_names()}
            names = sorted(known | {p.name for p in OUTPUT.glob("*") if p.is_dir()})
        else:
            names = [args.name]
        for name in names:
            if not NAME.fullmatch(name):
                raise FleetError(
                    f"fleet name {name!r}: use a lower-case letter, then letters, digits and dashes (21 at most)"
                )
            handle = locked(name)
            try:
                if args.verb == "down":
                    print(f"fleet {name}: {remove(name)} hosts removed")
                    continue
                if args.verb == "kill":
                    kill(name, args.host)
                    continue
                if args.verb in ("cut", "join"):
                    route(name, args.host, args.other, {"cut": "add", "join": "del"}[args.verb])
                    continue
                if args.verb in ("mount", "unmount"):
                    mount(name, args.host, args.directory, args.verb)
                    continue
                if args.verb == "memory":
                    memory(name, args.host, args.unit, args.megabytes)
                    continue
                if args.verb == "reboot":
                    reboot(name, args.host)
                    print(f"fleet {name}: {args.host} has booted")
                    continue
                hosts = args.hosts.split(",")
                bad = [h for h in hosts if not NAME.fullmatch(h)]
                if bad or len(set(hosts)) != len(hosts):
                    raise FleetError(f"--hosts {args.hosts}: not a comma list of distinct host names")
                print(up(name, hosts, args.keep))
            finally:
                os.close(handle)
        return 0
    except FleetError as error:
        print(f"fleet: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fleet: interrupted, removed what was started", file=sys.stderr)
        return 130


def network_names() -> list[str]:
    found = podman("network", "ls", "--filter", f"label={LABEL_CHECKOUT}={CHECKOUT}", "--format", "{{.Name}}").stdout
    return found.split()


if __name__ == "__main__":
    sys.exit(main())
