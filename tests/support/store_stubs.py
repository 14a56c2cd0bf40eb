"""The answers of Google Cloud Storage and the Hugging Face hub to the calls that read a folder.

Each is a route of `faulty_server`, which serves the files of its folder, with its faults, as gs://waste/set and
hf://datasets/owner/waste/set.
"""

from __future__ import annotations

import json
from email.message import Message
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from faulty_server import Answer, Route

GOOGLE_URL, HUB_URL = "gs://waste/set", "hf://datasets/owner/waste/set"
TOKEN = "hf_secret"


def google(folder: Path) -> Route:
    """Source: https://cloud.google.com/storage/docs/json_api/v1/objects, get and list."""

    def route(asked: str, headers: Message) -> str | Answer:
        parts = urlsplit(asked)
        if parts.path.startswith("/download/storage/v1/b/waste/o/"):
            return unquote(parts.path.rpartition("/o/")[2]).removeprefix("set/")
        if parts.path.startswith("/storage/v1/b/waste/o/"):
            name = unquote(parts.path.rpartition("/o/")[2]).removeprefix("set/")
            return _json(_object(folder / name)) if (folder / name).is_file() else Answer(404)
        if parts.path == "/storage/v1/b/waste/o":
            prefix = parse_qs(parts.query)["prefix"][0]
            found = [_object(path) for path in sorted(folder.iterdir()) if f"set/{path.name}".startswith(prefix)]
            return _json({"kind": "storage#objects", "items": found})
        return Answer(404)

    return route


def _object(path: Path) -> dict[str, str]:
    return {"kind": "storage#object", "bucket": "waste", "name": f"set/{path.name}", "size": str(path.stat().st_size)}


def hub(folder: Path, logins: list[tuple[str, str]], *, revision: str = "main") -> Route:
    """The hub, which sends tars from another host (as for large files): the same server under another name.

    Args:
        logins: receives (requested path, login of the request).

    Source: https://huggingface.co/docs/hub/api, and what huggingface_hub 2.4 asks for.
    """
    api, files = "/api/datasets/owner/waste", f"/datasets/owner/waste/resolve/{revision}/set/"

    def route(asked: str, headers: Message) -> str | Answer:
        path = asked.partition("?")[0]
        logins.append((path, headers.get("Authorization", "")))
        if path.startswith("/elsewhere/"):
            return unquote(path.removeprefix("/elsewhere/"))
        if headers.get("Authorization") != f"Bearer {TOKEN}":
            return Answer(401, b"Invalid username or password.", {"X-Error-Message": "Invalid username or password."})
        if path.startswith(files):
            name = path.removeprefix(files)
            if not (folder / unquote(name)).is_file():
                return Answer(404, b"Entry not found", {"X-Error-Code": "EntryNotFound"})
            port = headers["Host"].rpartition(":")[2]
            there = {"Location": f"http://localhost:{port}/elsewhere/{name}"}
            return Answer(302, b"", there) if name.endswith(".tar") else unquote(name)
        if path in (api, f"{api}/revision/{revision}"):
            return _json({"id": "owner/waste", "sha": "0" * 40, "siblings": []})
        if path == f"{api}/tree/{revision}/set":
            found = [
                {"type": "file", "oid": "0" * 40, "size": one.stat().st_size, "path": f"set/{one.name}"}
                for one in sorted(folder.iterdir())
            ]
            return _json(found)
        return Answer(404, b"", {"X-Error-Code": "EntryNotFound"})

    return route


def _json(value: object) -> Answer:
    return Answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})
