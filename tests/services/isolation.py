"""Keeps programs that write beside their own directories away from the machine's."""

from __future__ import annotations

import os

#: dockerd, containerd, podman and skopeo leave sockets, locks and caches here, whatever they are told.
_HIDDEN = ("/run", "/opt", "/var/lib")
_SCRIPT = f'for hidden in {" ".join(_HIDDEN)}; do mount -t tmpfs tmpfs "$hidden" || exit; done; exec "$@"'


def isolated(*command: str) -> list[str]:
    """Return `command` such that it has its mounts for itself, and they end with it. Its pid is the one started.

    Who is not root may not mount; then these programs keep to the home directory that they are given.
    """
    if os.geteuid() != 0:
        return list(command)
    return ["unshare", "--mount", "--propagation", "private", "--", "sh", "-c", _SCRIPT, "sh", *command]
