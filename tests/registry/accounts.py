"""A registry with accounts, for tests of who may do what."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass

from registry.access.passwords import hash_password
from registry.metadata import access_tokens, accounts, rules
from registry.metadata.access_tokens import new_token, secret_hash
from registry.metadata.engine import Database
from tests.content import Client, Image, digest_of, make_image
from tests.registry.talk import Answer, ask

NAME = "org/team/app"
PASSWORD = "correct horse"
HASH = hash_password(PASSWORD)
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
EVERYTHING = f"repository:{NAME}:pull,push,delete registry:catalog:*"


@dataclass
class Registry:
    """A registry with accounts, and its database."""

    client: Client
    database: Database

    async def user(self, name: str, right: str = "", node: str = "org") -> None:
        await self.database.write(accounts.add, name, accounts.USER, HASH)
        if right:
            await self.database.write(rules.grant, node, right, name, "")

    async def personal(self, owner: str, scope: list[tuple[str, str]] | None = None, ends_at: int | None = None) -> str:
        token = new_token()
        reach = json.dumps(scope or [])
        await self.database.write(access_tokens.add_personal, owner, "test", secret_hash(token), reach, ends_at)
        return token

    async def bearer(self, name: str, password: str = PASSWORD, scope: str = EVERYTHING) -> dict[str, str]:
        """Return the header of a token for requests, as a client gets it."""
        headers = basic(name, password) if name else {}
        answer = await ask(self.client, "GET", "/v2/token", params=[("scope", scope)], headers=headers)
        assert answer.status == 200, answer
        return {"Authorization": f"Bearer {answer.json['token']}"}

    async def image(self, name: str = NAME) -> Image:
        """Push an image as the administrator."""
        image = make_image()
        by = basic("root")
        for blob in image.blobs:
            path = f"/v2/{name}/blobs/uploads/?digest={digest_of(blob)}"
            assert (await ask(self.client, "POST", path, data=blob, headers=by)).status == 201
        answer = await put_manifest(self.client, image, by, name)
        assert answer.status == 201, answer
        return image


def basic(name: str, password: str = PASSWORD) -> dict[str, str]:
    return {"Authorization": f"Basic {base64.b64encode(f'{name}:{password}'.encode()).decode()}"}


async def put_manifest(client: Client, image: Image, headers: dict[str, str], name: str = NAME) -> Answer:
    headers = {**headers, "Content-Type": MANIFEST_TYPE}
    return await ask(client, "PUT", f"/v2/{name}/manifests/latest", data=image.manifest, headers=headers)
