"""Any sequence of operations leaves the registry as a model of a few dictionaries says."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from storage.oci import OCI_CONFIG, OCI_INDEX, OCI_MANIFEST
from tests.content import LAYER, descriptor, digest_of
from tests.services.processes import HytheServer, hythe_server

#: `a` is a repository and a folder at once; a name may hold the words of the protocol.
REPOSITORIES = ("a", "a/blobs/uploads", "z")
TAGS = ("latest", "v1", "V1")
EMPTY: dict[str, Any] = {}

repositories = st.sampled_from(REPOSITORIES)
numbers = st.integers(0, 3)
tags = st.sampled_from(TAGS)
#: Whether what a manifest points to is there: else most of them would be refused.
mostly = st.sampled_from([True, True, True, False])
algorithms = st.sampled_from(["sha256", "sha256", "sha512"])


@dataclass
class Repository:
    """What a repository should hold. It exists from the first thing on that was put into it."""

    exists: bool = False
    blobs: set[str] = field(default_factory=set)
    manifests: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)


@dataclass
class Upload:
    repository: str
    place: str
    content: bytes = b""


@dataclass
class Answer:
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class Registry(RuleBasedStateMachine):
    """One example: repositories under a prefix of their own, in a server that all examples share."""

    server: ClassVar[HytheServer]
    counter: ClassVar[Iterator[int]]

    def __init__(self) -> None:
        super().__init__()
        # What another example pushed must not be found by a mount here.
        self.prefix = f"example-{next(self.counter)}"
        self.model = {f"{self.prefix}/{name}": Repository() for name in REPOSITORIES}
        self.contents: dict[str, bytes] = {}
        self.uploads: list[Upload] = []
        self.ended: list[Upload] = []
        # Each connection belongs to one of the workers, and whichever is asked knows what the others were told.
        self.connections = [http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=30) for _ in range(3)]
        self.next = itertools.cycle(self.connections)

    def teardown(self) -> None:
        for connection in self.connections:
            connection.close()

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Answer:
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        connection = next(self.next)
        connection.request(method, path, body, sent)
        response = connection.getresponse()
        return Answer(response.status, response.headers, response.read())

    def blob(self, number: int) -> bytes:
        """Return one of a few contents; the last is empty."""
        return f"{self.prefix}:{number}:".encode() * (number + 1) if number < 3 else b""

    def name(self, repository: str) -> str:
        return f"{self.prefix}/{repository}"

    def hold_blob(self, name: str, digest: str, content: bytes) -> None:
        self.model[name].exists = True
        self.model[name].blobs.add(digest)
        self.contents[digest] = content

    # --- blobs

    @rule(repository=repositories, number=numbers, algorithm=algorithms)
    def push_a_blob_at_once(self, repository: str, number: int, algorithm: str) -> None:
        name, content = self.name(repository), self.blob(number)
        digest = digest_of(content, algorithm)
        answer = self.ask("POST", f"/v2/{name}/blobs/uploads/?digest={digest}", content)
        assert answer.status == 201
        assert answer.headers["Location"] == f"/v2/{name}/blobs/{digest}"
        self.hold_blob(name, digest, content)

    @rule(repository=repositories, number=numbers)
    def push_a_blob_that_is_something_else(self, repository: str, number: int) -> None:
        digest = digest_of(self.blob(number) + b"!")
        answer = self.ask("POST", f"/v2/{self.name(repository)}/blobs/uploads/?digest={digest}", self.blob(number))
        assert (answer.status, code(answer)) == (400, "DIGEST_INVALID")

    @rule(repository=repositories, source=repositories, number=numbers, algorithm=algorithms, anonymous=st.booleans())
    def mount_a_blob(self, repository: str, source: str, number: int, algorithm: str, anonymous: bool) -> None:
        name, digest = self.name(repository), digest_of(self.blob(number), algorithm)
        origin = "" if anonymous else f"&from={self.name(source)}"
        answer = self.ask("POST", f"/v2/{name}/blobs/uploads/?mount={digest}{origin}")
        sources = list(self.model) if anonymous else [self.name(source)]
        # Other examples may hold the empty blob.
        is_known = any(digest in self.model[held].blobs for held in sources) or (anonymous and number == 3)
        if not is_known or (number == 3 and answer.status == 202):
            assert answer.status == 202
            self.uploads.append(Upload(name, answer.headers["Location"]))
        else:
            assert answer.status == 201
            assert answer.headers["Docker-Content-Digest"] == digest
            self.hold_blob(name, digest, self.blob(number))

    @rule(repository=repositories, number=numbers, which=st.integers(0, 20), present=mostly)
    def delete_a_blob(self, repository: str, number: int, which: int, present: bool) -> None:
        name, digest = self.name(repository), digest_of(self.blob(number))
        held = [(name, digest) for name, repository in self.model.items() for digest in sorted(repository.blobs)]
        if present and held:
            name, digest = held[which % len(held)]
        answer = self.ask("DELETE", f"/v2/{name}/blobs/{digest}")
        assert answer.status == (202 if digest in self.model[name].blobs else 404)
        self.model[name].blobs.discard(digest)

    # --- uploads

    @rule(repository=repositories, algorithm=algorithms)
    def begin_an_upload(self, repository: str, algorithm: str) -> None:
        name = self.name(repository)
        answer = self.ask("POST", f"/v2/{name}/blobs/uploads/?digest-algorithm={algorithm}")
        assert answer.status == 202
        self.uploads.append(Upload(name, answer.headers["Location"]))

    @precondition(lambda self: self.uploads)
    @rule(which=st.integers(0, 5), number=numbers, with_range=st.booleans())
    def append_a_chunk(self, which: int, number: int, with_range: bool) -> None:
        upload, chunk = self.uploads[which % len(self.uploads)], self.blob(number)
        start = len(upload.content)
        headers = {"Content_Range": f"{start}-{start + len(chunk) - 1}"} if with_range and chunk else {}
        answer = self.ask("PATCH", upload.place, chunk, **headers)
        assert answer.status == 202
        upload.content += chunk
        assert answer.headers["Range"] == range_of(upload)

    @precondition(lambda self: self.uploads)
    @rule(which=st.integers(0, 5), distance=st.sampled_from([-1, 1, 7]), method=st.sampled_from(["PATCH", "PUT"]))
    def append_a_chunk_out_of_order(self, which: int, distance: int, method: str) -> None:
        upload = self.uploads[which % len(self.uploads)]
        start = max(0, len(upload.content) + distance)
        if start == len(upload.content):
            return
        path = upload.place + (f"?digest={digest_of(upload.content)}" if method == "PUT" else "")
        answer = self.ask(method, path, b"chunk", Content_Range=f"{start}-{start + 4}")
        assert (answer.status, code(answer)) == (416, "BLOB_UPLOAD_INVALID")
        assert answer.headers["Range"] == range_of(upload)

    @precondition(lambda self: self.uploads)
    @rule(which=st.integers(0, 5), last=st.sampled_from([b"", b"the last chunk"]), algorithm=algorithms)
    def finish_an_upload(self, which: int, last: bytes, algorithm: str) -> None:
        upload = self.end_upload(which)
        upload.content += last
        digest = digest_of(upload.content, algorithm)
        answer = self.ask("PUT", f"{upload.place}?digest={digest}", last)
        assert answer.status == 201
        assert answer.headers["Docker-Content-Digest"] == digest
        self.hold_blob(upload.repository, digest, upload.content)

    @precondition(lambda self: self.uploads)
    @rule(which=st.integers(0, 5))
    def finish_an_upload_as_something_else(self, which: int) -> None:
        upload = self.end_upload(which)
        answer = self.ask("PUT", f"{upload.place}?digest={digest_of(upload.content + b'!')}")
        assert (answer.status, code(answer)) == (400, "DIGEST_INVALID")

    @precondition(lambda self: self.uploads)
    @rule(which=st.integers(0, 5))
    def cancel_an_upload(self, which: int) -> None:
        assert self.ask("DELETE", self.end_upload(which).place).status == 204

    def end_upload(self, which: int) -> Upload:
        upload = self.uploads.pop(which % len(self.uploads))
        self.ended.append(upload)
        return upload

    @precondition(lambda self: self.ended)
    @rule(which=st.integers(0, 5), method=st.sampled_from(["GET", "PATCH", "PUT", "DELETE"]))
    def go_on_with_an_upload_that_ended(self, which: int, method: str) -> None:
        upload = self.ended[which % len(self.ended)]
        answer = self.ask(method, f"{upload.place}?digest={digest_of(b'')}")
        assert (answer.status, code(answer)) == (404, "BLOB_UPLOAD_UNKNOWN")

    # --- manifests

    @rule(
        repository=repositories,
        config=numbers,
        layers=st.lists(numbers, max_size=2),
        subject=st.none() | numbers,
        moved=st.lists(tags, max_size=2, unique=True),
        complete=mostly,
    )
    def push_an_image(
        self, repository: str, config: int, layers: list[int], subject: int | None, moved: list[str], complete: bool
    ) -> None:
        for number in (config, *layers) if complete else ():
            self.push_a_blob_at_once(repository, number, "sha256")
        content = {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": descriptor(self.blob(config), OCI_CONFIG),
            "layers": [descriptor(self.blob(layer), LAYER) for layer in layers],
        }
        if subject is not None:
            content["subject"] = descriptor(self.subject(subject), OCI_MANIFEST)
        needed = {digest_of(self.blob(number)) for number in (config, *layers)}
        held = self.model[self.name(repository)].blobs
        self.push_manifest(repository, json.dumps(content).encode(), OCI_MANIFEST, moved, missing=needed - held)

    @rule(
        repository=repositories,
        children=st.lists(st.integers(0, 9), max_size=2),
        moved=st.lists(tags, max_size=1),
        complete=mostly,
    )
    def push_an_index(self, repository: str, children: list[int], moved: list[str], complete: bool) -> None:
        sources = [self.model[self.name(repository)]] if complete else self.model.values()
        known = sorted({item for held in sources for item in held.manifests.items()})
        chosen = [known[child % len(known)] for child in children] if known else []
        manifests = [descriptor(content, media_type) for _, (media_type, content) in chosen]
        index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": manifests, "annotations": {"of": self.prefix}}
        missing = {digest_of(content) for _, (_, content) in chosen} - set(self.model[self.name(repository)].manifests)
        self.push_manifest(repository, json.dumps(index).encode(), OCI_INDEX, moved, missing=missing)

    def push_manifest(
        self, repository: str, content: bytes, media_type: str, moved: list[str], *, missing: set[str]
    ) -> None:
        name, digest = self.name(repository), digest_of(content)
        query = "&".join(f"tag={tag}" for tag in moved)
        answer = self.ask("PUT", f"/v2/{name}/manifests/{digest}?{query}", content, Content_Type=media_type)
        if missing:
            assert answer.status == 404
            assert {error["detail"]["digest"] for error in answer.json()["errors"]} == missing
            return
        assert answer.status == 201
        assert answer.headers.get_all("OCI-Tag", []) == moved
        held = self.model[name]
        held.exists = True
        held.manifests[digest] = (media_type, content)
        held.tags.update(dict.fromkeys(moved, digest))

    @rule(repository=repositories, which=st.integers(0, 9), tag=tags, complete=mostly)
    def tag_a_manifest_of_here_or_elsewhere(self, repository: str, which: int, tag: str, complete: bool) -> None:
        known = sorted({item for held in self.model.values() for item in held.manifests.items()})
        if not known:
            return
        digest, (media_type, content) = known[which % len(known)]
        name, held = self.name(repository), self.model[self.name(repository)]
        for missing in self.missing(held, content) & self.contents.keys() if complete else ():
            path = f"/v2/{name}/blobs/uploads/?digest={missing}"
            assert self.ask("POST", path, self.contents[missing]).status == 201
            self.hold_blob(name, missing, self.contents[missing])
        is_whole = not self.missing(held, content)
        answer = self.ask("PUT", f"/v2/{name}/manifests/{tag}", content, Content_Type=media_type)
        assert answer.status == (201 if is_whole else 404)
        if is_whole:
            held.exists = True
            held.manifests[digest] = (media_type, content)
            held.tags[tag] = digest

    @rule(repository=repositories, tag=tags, which=st.integers(0, 20), present=mostly, through_api=st.booleans())
    def delete_a_tag(self, repository: str, tag: str, which: int, present: bool, through_api: bool) -> None:
        name = self.name(repository)
        held = [(name, tag) for name, repository in self.model.items() for tag in sorted(repository.tags)]
        if present and held:
            name, tag = held[which % len(held)]
        answer = self.delete_reference(name, tag, through_api=through_api)
        assert answer.status == (deleted(through_api) if tag in self.model[name].tags else 404)
        self.model[name].tags.pop(tag, None)

    @rule(repository=repositories, which=st.integers(0, 20), present=mostly, through_api=st.booleans())
    def delete_a_manifest(self, repository: str, which: int, present: bool, through_api: bool) -> None:
        held = [(name, digest) for name, repository in self.model.items() for digest in sorted(repository.manifests)]
        if not held:
            return
        name, digest = held[which % len(held)]
        # One of another repository may or may not be in this one.
        name = name if present else self.name(repository)
        target = self.model[name]
        answer = self.delete_reference(name, digest, through_api=through_api)
        assert answer.status == (deleted(through_api) if digest in target.manifests else 404)
        target.manifests.pop(digest, None)
        target.tags = {tag: pointed for tag, pointed in target.tags.items() if pointed != digest}

    def delete_reference(self, name: str, reference: str, *, through_api: bool) -> Answer:
        if through_api:
            return self.ask("DELETE", f"/api/v1/manifest?repository={name}&reference={reference}")
        return self.ask("DELETE", f"/v2/{name}/manifests/{reference}")

    def missing(self, held: Repository, content: bytes) -> set[str]:
        manifest = json.loads(content)
        if "config" in manifest:
            return {entry["digest"] for entry in [manifest["config"], *manifest["layers"]]} - held.blobs
        return {entry["digest"] for entry in manifest["manifests"]} - held.manifests.keys()

    def subject(self, number: int) -> bytes:
        """Return what others may refer to: need not be there, and never is."""
        return f"{self.prefix} subject {number}".encode()

    # --- what must hold after each step

    @invariant()
    def blobs_are_where_they_should_be(self) -> None:
        for name, held in self.model.items():
            for digest, content in self.contents.items():
                head = self.ask("HEAD", f"/v2/{name}/blobs/{digest}")
                got = self.ask("GET", f"/v2/{name}/blobs/{digest}")
                if digest in held.blobs:
                    assert (head.status, got.status, got.body) == (200, 200, content)
                    assert head.headers["Content-Length"] == str(len(content))
                    assert head.headers["Docker-Content-Digest"] == digest
                else:
                    assert (head.status, got.status) == (404, 404)

    @invariant()
    def manifests_and_tags_are_where_they_should_be(self) -> None:
        known = {digest for held in self.model.values() for digest in held.manifests}
        for name, held in self.model.items():
            expected = {digest: digest for digest in held.manifests} | held.tags
            for reference in known | set(TAGS):
                head = self.ask("HEAD", f"/v2/{name}/manifests/{reference}")
                got = self.ask("GET", f"/v2/{name}/manifests/{reference}")
                if reference not in expected:
                    assert (head.status, got.status) == (404, 404)
                    continue
                media_type, content = held.manifests[expected[reference]]
                assert (head.status, got.status, got.body) == (200, 200, content)
                for answer in (head, got):
                    assert answer.headers["Docker-Content-Digest"] == expected[reference]
                    assert answer.headers["Content-Type"] == media_type
                    assert answer.headers["Content-Length"] == str(len(content))

    @invariant()
    def listings_name_what_is_there(self) -> None:
        for name, held in self.model.items():
            listed = self.ask("GET", f"/v2/{name}/tags/list")
            details = self.ask("GET", f"/api/v1/tags?repository={name}")
            if not held.exists:
                assert (listed.status, code(listed), details.status) == (404, "NAME_UNKNOWN", 404)
                continue
            assert listed.json() == {"name": name, "tags": sorted(held.tags)}
            assert [(tag["name"], tag["digest"]) for tag in details.json()["tags"]] == sorted(held.tags.items())

    @invariant()
    def the_catalog_names_the_repositories(self) -> None:
        existing = sorted(name for name, held in self.model.items() if held.exists)
        listed = self.ask("GET", f"/v2/_catalog?n=10&last={self.prefix}").json()["repositories"]
        assert [name for name in listed if name.startswith(f"{self.prefix}/")] == existing
        nodes = self.ask("GET", f"/api/v1/repositories?path={self.prefix}").json()["repositories"]
        for node in nodes:
            held = self.model.get(node["name"], Repository())
            assert node["is_repository"] == held.exists
            assert (node["tags"], node["manifests"]) == (len(held.tags), len(held.manifests))
            assert node["has_children"] == any(name.startswith(f"{node['name']}/") for name in existing)
        assert {node["name"] for node in nodes} == {"/".join(name.split("/")[:2]) for name in existing}

    @invariant()
    def referrers_are_those_that_are_there(self) -> None:
        for name, held in self.model.items():
            expected: dict[str, set[str]] = {}
            for digest, (_, content) in held.manifests.items():
                subject = json.loads(content).get("subject", EMPTY).get("digest")
                expected.setdefault(subject, set()).add(digest)
            for number in range(4):
                subject = digest_of(self.subject(number))
                found = self.ask("GET", f"/v2/{name}/referrers/{subject}")
                assert found.status == 200
                assert {entry["digest"] for entry in found.json()["manifests"]} == expected.get(subject, set())

    @invariant()
    def uploads_stand_where_they_should(self) -> None:
        for upload in self.uploads:
            status = self.ask("GET", upload.place)
            assert (status.status, status.headers["Range"]) == (204, range_of(upload))


def deleted(through_api: bool) -> int:
    return 200 if through_api else 202


def range_of(upload: Upload) -> str:
    return f"0-{max(0, len(upload.content) - 1)}"


def code(answer: Answer) -> str:
    return str(answer.json()["errors"][0]["code"])


@pytest.mark.parametrize("workers", [1, 2])
def test_any_sequence_of_operations_does_what_the_model_does(
    tmp_path_factory: pytest.TempPathFactory, workers: int
) -> None:
    environment = {
        "HYTHE_DATABASE__SYNC": "false",
        "HYTHE_STORAGE__FILESYSTEM__SYNC": "false",
        "HYTHE_LOG__ACCESS": "0",
    }
    with contextlib.ExitStack() as stack:
        directory = tmp_path_factory.mktemp("model")
        server = stack.enter_context(hythe_server(directory, "--workers", str(workers), environment=environment))
        machine = type("Machine", (Registry,), {"server": server, "counter": itertools.count()})
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=25,
                stateful_step_count=20,
                deadline=None,
                derandomize=True,
                database=None,
                suppress_health_check=[HealthCheck.too_slow],
            ),
        )
