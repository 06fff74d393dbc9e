"""Clients at once, and clients that are cut off."""

import hashlib
import secrets
import signal
import socket
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from storage.names import parse_repository
from tests.clients.plain import PlainClient
from tests.clients.traffic import Traffic
from tests.conftest import needs
from tests.content import digest_of
from tests.services.containers import ContainerTools
from tests.services.images import Layout, packed_image, random_layer, write_layout
from tests.services.processes import HytheServer, wait_until

pytestmark = [needs("skopeo"), pytest.mark.clients]

CLIENTS = 10
