from tests.content import Client, Pusher


async def test_an_image_is_pushed_and_pulled(client: Client) -> None:
    push = Pusher(client)
    image = await push.image("v1")
    async with client.get("/v2/org/team/app/manifests/v1") as response:
        assert response.status == 200
        assert await response.read() == image.manifest
        assert response.headers["Docker-Content-Digest"] == image.digest
    for blob in image.blobs:
        async with client.get(f"/v2/org/team/app/blobs/{await push.blob(blob)}") as response:
            assert await response.read() == blob
