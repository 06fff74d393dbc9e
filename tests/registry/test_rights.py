"""What somebody may hand on: rights where he administers, tokens of his own."""

from __future__ import annotations

from typing import Any

import pytest

from registry.metadata import accounts, audit, rules
from tests.registry.talk import Answer, ask
from tests.registry.test_accounts import HASH, PASSWORD, Registry, basic, registry  # noqa: F401 - a fixture


async def rule(reg: Registry, method: str, by: str, node: str, right: str, subject: str) -> Answer:
    params = {"node": node, "right": right, "subject": subject}
    return await ask(reg.client, method, "/api/v1/rules", params=params, headers=basic(by))
