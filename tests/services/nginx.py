"""A real nginx before the registry, with a configuration and a port of its own."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.services.processes import HytheServer, Program, free_port

_CONFIGURATION = """
{user}
daemon off;
worker_processes 1;
pid {directory}/pid;
error_log stderr;
events {{}}
http {{
    access_log off;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    upstream registry {{
        {servers}
    }}
    server {{
        listen 127.0.0.1:{port};
        client_max_body_size 0;
        location {prefix}/ {{
            proxy_pass http://registry/;
            proxy_http_version 1.1;
            proxy_request_buffering off;
            proxy_buffering off;
            proxy_set_header Host $http_host;
            proxy_set_header X-Forwarded-Proto $scheme;
            {prefix_header}
        }}
    }}
}}
"""


@dataclass
class Nginx(Program):
    """An nginx; `url` leads to the registry behind it."""

    port: int = 0
    prefix: str = ""

    @property
    def address(self) -> str:
        """`HOST:PORT`, as it stands before an image's name."""
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        """Where the registry begins."""
        return f"http://{self.address}{self.prefix}"


@contextlib.contextmanager
def nginx(directory: Path, *servers: HytheServer, prefix: str = "") -> Iterator[Nginx]:
    """Run nginx before `servers`, which take turns, at the root or below `prefix`, while the block lasts."""
    directory.mkdir()
    port = free_port()
    configuration = directory / "nginx.conf"
    configuration.write_text(
        _CONFIGURATION.format(
            user="user root;" if os.geteuid() == 0 else "",
            directory=directory,
            port=port,
            servers=" ".join(f"server {server.address} max_fails=1 fail_timeout=1s;" for server in servers),
            prefix=prefix,
            prefix_header=f"proxy_set_header X-Forwarded-Prefix {prefix};" if prefix else "",
        )
    )
    command = ["nginx", "-p", str(directory), "-c", str(configuration), "-e", "stderr"]
    proxy = Nginx(command, directory / "log", port=port, prefix=prefix)
    try:
        proxy.start()
        proxy.wait_for(f"{proxy.url}/v2/")
        yield proxy
    finally:
        proxy.stop()
