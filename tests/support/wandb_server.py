"""A W&B server for tests: answers the requests of the real client (wandb 0.31) from memory, on this machine.

It replaces the service, which tests cannot reach. Its answers follow the client's side of the protocol (GraphQL, file
stream, uploads), not the service's source: it shows what the client sends and when, not what the service stores.
Unknown requests get an empty answer and are listed in `unknown`, which tests check.

    with WandbServer() as server:
        subprocess.run(..., env={**os.environ, **server.environment})
        server.runs["abc"].rows()

Faults: `refuse` closes every connection without an answer, `hang_s` delays each answer.
"""

from __future__ import annotations

import base64
import gzip
import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

KEY = "0123456789" * 4  # the form of an API key
_OPERATION = re.compile(r"\b(?:query|mutation)\s+(\w+)")
_STREAM = re.compile(r"/files/[^/]*/[^/]*/([^/]*)/file_stream")
_HISTORY = "wandb-history.jsonl"


@dataclass
class ServedRun:
    """A run as a dashboard would show it. `stream` has the lines of each file, by offset."""

    id: str
    project: str
    name: str
    group: str = ""
    job_type: str = ""
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    stream: dict[str, dict[int, str]] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    state: str = "running"
    starts: int = 0

    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(self.lines(_HISTORY)[offset]) for offset in sorted(self.lines(_HISTORY))]

    def lines(self, name: str) -> dict[int, str]:
        return self.stream.get(name, {})

    def tail(self, name: str) -> str:
        lines = self.lines(name)
        return json.dumps([lines[max(lines)]] if lines else [])

    def summary(self) -> dict[str, Any]:
        lines = self.lines("wandb-summary.json")
        found: dict[str, Any] = json.loads(lines[max(lines)]) if lines else {}
        return found


@dataclass
class ServedArtifact:
    id: str
    name: str
    type: str
    digest: str
    aliases: list[str]
    metadata: dict[str, Any]
    manifest: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    committed: bool = False
    used_by: list[str] = field(default_factory=list)


class WandbServer:
    """`runs` and `artifacts` are by id; `traffic` has every request as bytes, without the header with the key."""

    def __init__(self) -> None:
        self.runs: dict[str, ServedRun] = {}
        self.artifacts: dict[str, ServedArtifact] = {}
        self.views: list[dict[str, Any]] = []
        self.traffic: list[bytes] = []
        self.unknown: list[str] = []
        self.refuse = False
        self.hang_s = 0.0
        self._lock = threading.RLock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._http.daemon_threads = True
        self._http.handle_error = lambda *_: None  # type: ignore[method-assign]  # a client that was killed
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    @property
    def environment(self) -> dict[str, str]:
        """The environment of a client that uses this server, and sends every second instead of every 15."""
        return {
            "WANDB_BASE_URL": self.url,
            "WANDB_API_KEY": KEY,
            "WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL": "1",
            "no_proxy": "127.0.0.1",
        }

    def __enter__(self) -> WandbServer:
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._http.shutdown()
        self._http.server_close()

    def artifact(self, kind: str) -> ServedArtifact:
        """Return the only committed artifact of a type."""
        (found,) = (one for one in self.artifacts.values() if one.type == kind and one.committed)
        return found

    # --- HTTP ---------------------------------------------------------------------------------------------------------

    def answer(self, method: str, path: str, headers: dict[str, str], body: bytes) -> tuple[int, Any] | None:
        """Return (status, JSON) for a request; None: close the connection without an answer."""
        secret = headers.pop("Authorization", "")
        self.traffic.append(f"{method} {path} {headers}\n".encode() + body)
        until = time.monotonic() + self.hang_s
        while self.hang_s and time.monotonic() < until:
            time.sleep(0.05)
        if self.refuse:
            return None
        with self._lock:
            if path.startswith("/storage/") and method == "PUT":
                return 200, self._put(path.removeprefix("/storage/").split("?")[0], body)
            if secret != "Basic " + base64.b64encode(f"api:{KEY}".encode()).decode():
                return 401, {"errors": [{"message": "invalid API key"}]}
            if path == "/graphql":
                return 200, {"data": self._graphql(json.loads(body))}
            if stream := _STREAM.fullmatch(path):
                return 200, self._file_stream(self.runs[stream.group(1)], json.loads(body))
            self.unknown.append(f"{method} {path}")
            return 404, {}

    def _put(self, key: str, body: bytes) -> dict[str, Any]:
        kind, owner, name = key.split("/", 2)
        if kind == "run":
            self.runs[owner].files[name] = body
        elif kind == "manifest":
            self.artifacts[owner].manifest = json.loads(body)
        else:
            self.artifacts[owner].files[name] = body
        return {}

    def _file_stream(self, run: ServedRun, request: dict[str, Any]) -> dict[str, Any]:
        for name, part in request.get("files", {}).items():
            lines = run.stream.setdefault(name, {})
            lines.update({part["offset"] + number: line for number, line in enumerate(part["content"])})
        if request.get("preempting"):
            run.state = "preempting"
        if request.get("complete"):
            failed = "preempted" if run.state == "preempting" else "failed"
            run.state = "finished" if request.get("exitcode", 0) == 0 else failed
        return {"limits": {}}

    # --- GraphQL: one method per operation ---------------------------------------------------------------------------

    def _graphql(self, request: dict[str, Any]) -> dict[str, Any]:
        variables = request.get("variables") or {}
        variables |= variables["input"] if isinstance(variables.get("input"), dict) else {}
        found = _OPERATION.search(request["query"])
        operation = found.group(1) if found else request["query"][:60]
        method: Callable[[dict[str, Any]], dict[str, Any]] | None = getattr(self, f"_on_{operation}", None)
        if method is None:
            self.unknown.append(operation)
            return {}
        return method(variables)

    def _bucket(self, run: ServedRun) -> dict[str, Any]:
        owner = {"id": "project", "name": run.project, "entity": {"id": "entity", "name": "tests"}}
        lines = {f"{name}LineCount": len(run.lines(f"wandb-{name}.jsonl")) for name in ("history", "events")}
        tails = {f"{name}Tail": run.tail(f"wandb-{name}.jsonl") for name in ("history", "events")}
        return {
            "id": f"store-{run.id}", "name": run.id, "displayName": run.name, "project": owner, "sweepName": None,
            "config": json.dumps(run.config), "summaryMetrics": json.dumps(run.summary()), "tags": run.tags,
            "notes": None, "description": None, "logLineCount": 0, "wandbConfig": json.dumps({"t": 1}),
            **lines, **tails,
        }  # fmt: skip

    def _on_Viewer(self, _: dict[str, Any]) -> dict[str, Any]:
        teams = {"edges": [{"node": {"name": "tests"}}]}
        viewer = {"id": "user", "entity": "tests", "username": "tests", "email": "", "flags": "{}", "teams": teams}
        return {"viewer": viewer}

    def _on_GetDefaultEntity(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"viewer": {"id": "user", "entity": "tests"}}

    def _on_ServerFeaturesQuery(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    def _on_OrganizationCoreWeaveOrganizationID(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"entity": {"organization": {"coreWeaveOrganizationId": None}}}

    def _on_UpsertBucket(self, asked: dict[str, Any]) -> dict[str, Any]:
        name = asked.get("name") or str(asked.get("id", "")).removeprefix("store-")
        inserted = name not in self.runs
        run = self.runs.setdefault(name, ServedRun(name, asked.get("project") or "", asked.get("displayName") or name))
        for key, attribute in (("tags", "tags"), ("groupName", "group"), ("jobType", "job_type")):
            if asked.get(key) is not None:
                setattr(run, attribute, asked[key])
        if asked.get("config"):
            run.config = json.loads(asked["config"])
        if asked.get("host"):  # the first request of a process
            run.state = "running"
            run.starts += 1
        return {"upsertBucket": {"bucket": self._bucket(run), "inserted": inserted}}

    def _on_RunResumeStatus(self, asked: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.get(asked["name"])
        model = {"id": "model", "name": asked.get("project"), "entity": {"id": "entity", "name": "tests"}}
        return {"model": {**model, "bucket": self._bucket(run) if run else None}}

    def _on_RunStoppedStatus(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"project": {"run": {"stopped": False}}}

    def _on_CreateRunFiles(self, asked: dict[str, Any]) -> dict[str, Any]:
        files = [
            {"name": name, "uploadUrl": f"{self.url}/storage/run/{asked['run']}/{name}"} for name in asked["files"]
        ]
        return {"createRunFiles": {"runID": f"store-{asked['run']}", "uploadHeaders": [], "files": files}}

    def _on_MarkRunFilesUploaded(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"markRunFilesUploaded": {"success": True}}

    def _on_CreateArtifact(self, asked: dict[str, Any]) -> dict[str, Any]:
        name, aliases = asked["artifactCollectionName"], [one["alias"] for one in asked.get("aliases") or []]
        for there in self.artifacts.values():
            if (there.name, there.digest, there.committed) == (name, asked["digest"], True):
                there.aliases = sorted({*there.aliases, *aliases})
                latest = {"id": there.id, "versionIndex": 0}
                found = {"id": there.id, "state": "COMMITTED", "artifactSequence": {"latestArtifact": latest}}
                return {"createArtifact": {"artifact": found}}
        made = ServedArtifact(
            f"artifact{len(self.artifacts)}", name, asked["artifactTypeName"], asked["digest"], aliases,
            json.loads(asked.get("metadata") or "{}"),
        )  # fmt: skip
        self.artifacts[made.id] = made
        answer = {"id": made.id, "state": "PENDING", "artifactSequence": {"latestArtifact": None}}
        return {"createArtifact": {"artifact": answer}}

    def _on_CreateArtifactManifest(self, asked: dict[str, Any]) -> dict[str, Any]:
        url = f"{self.url}/storage/manifest/{asked['artifactID']}/manifest"
        manifest = {"id": f"manifest-{asked['artifactID']}", "file": {"id": "f", "uploadUrl": url, "uploadHeaders": []}}
        return {"createArtifactManifest": {"artifactManifest": manifest}}

    def _on_CreateArtifactFiles(self, asked: dict[str, Any]) -> dict[str, Any]:
        edges = [
            {"node": {
                "storagePath": one["name"], "uploadHeaders": [], "uploadMultipartUrls": None,
                "uploadUrl": f"{self.url}/storage/artifact/{one['artifactID']}/{one['name']}",
                "artifact": {"id": one["artifactID"]},
            }}
            for one in asked["artifactFiles"]
        ]  # fmt: skip
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def _on_CommitArtifact(self, asked: dict[str, Any]) -> dict[str, Any]:
        artifact = self.artifacts[asked["artifactID"]]
        artifact.committed = True
        return {"commitArtifact": {"artifact": {"id": artifact.id, "digest": artifact.digest}}}

    def _on_UseArtifact(self, asked: dict[str, Any]) -> dict[str, Any]:
        self.artifacts[asked["artifactID"]].used_by.append(asked.get("runName") or "")
        return {"useArtifact": {"artifact": {"id": asked["artifactID"]}}}

    def _on_ArtifactType(self, _: dict[str, Any]) -> dict[str, Any]:  # "does it exist yet?"
        return {"project": {"artifactType": None, "artifact": None}}

    def _on_ArtifactByID(self, asked: dict[str, Any]) -> dict[str, Any]:
        one = self.artifacts[asked["id"]]
        owner = {
            "id": "project",
            "internalId": "UHJvamVjdEludGVybmFsSWQ6MQ==",
            "name": "p",
            "entity": {"name": "tests"},
        }
        collection = {"__typename": "ArtifactSequence", "id": "collection", "name": one.name, "project": owner}
        return {
            "artifact": {
                "__typename": "Artifact", "id": one.id, "artifactSequence": collection, "versionIndex": 0,
                "artifactType": {"name": one.type}, "description": None, "metadata": json.dumps(one.metadata),
                "ttlDurationSeconds": -1, "ttlIsInherited": True, "tags": [], "historyStep": None,
                "state": "COMMITTED", "size": 0, "digest": one.digest, "commitHash": None, "fileCount": 1,
                "createdAt": "2026-01-01T00:00:00", "updatedAt": None, "aliases": [],
            }
        }  # fmt: skip

    def _on_UpsertView2(self, asked: dict[str, Any]) -> dict[str, Any]:
        self.views.append(asked)
        return {"upsertView": {"view": {"id": "view", "name": asked["name"]}, "inserted": True}}


def _handler(server: WandbServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            try:
                answer = server.answer(self.command, self.path, dict(self.headers.items()), body)
            except Exception as error:  # the client would retry a 5xx for minutes
                server.unknown.append(f"{self.path}: {error!r}")
                answer = 400, {"errors": [{"message": repr(error)}]}
            if answer is None:
                self.close_connection = True
                return
            content = json.dumps(answer[1]).encode()
            self.send_response(answer[0])
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = handle_any

    return Handler
