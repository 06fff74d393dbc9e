"""Keeps programs that write beside their own directories away from the machine's."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from shlex import quote

#: dockerd, containerd, podman and skopeo leave sockets, locks and caches here, whatever they are told.
_HIDDEN = ("/run", "/opt", "/var/lib")
_SCRIPT = f'for hidden in {" ".join(_HIDDEN)}; do mount -t tmpfs tmpfs "$hidden" || exit; done; '


def isolated(*command: str, replaced: Mapping[str, Path] | None = None) -> list[str]:
    """Return `command` such that it has its mounts for itself, and they end with it. Its pid is the one started.

    Directories of the machine that are `replaced` are seen by it as others. Who is not root may not mount; then these
    programs keep to the home directory that they are given.
    """
    if os.geteuid() != 0:
        return list(command)
    binds = [f"mount --bind {quote(str(there))} {quote(here)} || exit; " for here, there in (replaced or {}).items()]
    script = f'{_SCRIPT}{"".join(binds)}exec "$@"'
    return ["unshare", "--mount", "--propagation", "private", "--", "sh", "-c", script, "sh", *command]
