"""A stand-in for the Hugging Face hub: as much of its HTTP interface as is called here."""

import base64
import contextlib
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from huggingface_hub import constants

TOKEN = "hf_of_me"


class Hub(ThreadingHTTPServer):
    """Repositories in memory, each a list of commits; only `TOKEN` may write, to those of `me`."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories = {}  # by name: {"private": …, "commits": [{path: bytes}]}
        self.large = {}  # by checksum: what is uploaded on its own
        self.messages = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def commit(self, name, changes):
        commits = self.repositories.setdefault(name, {"private": False, "commits": []})["commits"]
        commits.append({**(commits[-1] if commits else {}), **changes})
        return sha(commits)


def sha(commits):
    return hashlib.sha1(str(len(commits)).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def _answer(self, status, body=b"", **headers):
        if not isinstance(body, bytes):
            body, headers["Content-Type"] = json.dumps(body).encode(), "application/json"
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _may_write(self, name):
        return self.headers.get("Authorization") == f"Bearer {TOKEN}" and name.startswith("me/")

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub, path = self.server, self.path.partition("?")[0]
        if path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if not self._may_write(name):
                return self._answer(401, {"error": "Invalid username or password."})
            if name in hub.repositories:
                return self._answer(409, {"error": "it is there", "url": f"{hub.url}/{name}"})
            private = asked.get("visibility") == "private"
            hub.repositories[name] = {"private": private, "commits": [{}]}
            return self._answer(200, {"url": f"{hub.url}/{name}"})
        large = re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path)
        if large:
            assert self._may_write(large[1])
            objects = [
                {**asked, "actions": {"upload": {"href": f"{hub.url}/large/{asked['oid']}"}}}
                for asked in json.loads(body)["objects"]
            ]
            return self._answer(200, {"transfer": "basic", "objects": objects})
        name, action = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(\w+)/main", path).groups()
        assert self._may_write(name)
        if action == "preupload":
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".eqx") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return self._answer(200, {"files": modes})
        assert action == "commit"
        lines = [json.loads(line) for line in body.splitlines()]
        changes = {}
        for kind, value in ((line["key"], line["value"]) for line in lines):
            if kind == "header":
                hub.messages.append(value["summary"])
            elif kind == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            else:
                assert kind == "lfsFile"
                changes[value["path"]] = hub.large[value["oid"]]
        commit = hub.commit(name, changes)
        address = f"{hub.url}/{name}/commit/{commit}"
        return self._answer(200, {"commitUrl": address, "commitOid": commit, "success": True})

    def do_PUT(self):
        data = self.rfile.read(int(self.headers["Content-Length"]))
        oid = self.path.rpartition("/")[2]
        assert hashlib.sha256(data).hexdigest() == oid
        self.server.large[oid] = data
        self._answer(200)

    def do_GET(self):
        path = self.path.partition("?")[0]
        found = re.fullmatch(
            r"/(?:api/models/)?([^/]+/[^/]+)(?:/(revision|tree|resolve)/([^/]+)(?:/(.+))?)?", path
        )
        name, kind, revision, file = found.groups()
        repository = self.server.repositories.get(name)
        if repository is None or (repository["private"] and not self._may_write(name)):
            return self._answer(401, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        commits = repository["commits"]
        known = {sha(commits[: i + 1]): files for i, files in enumerate(commits)}
        known |= {None: commits[-1], "main": commits[-1]}
        if revision not in known:
            return self._answer(404, {"error": "no"}, X_Error_Code="RevisionNotFound")
        files = known[revision]
        commit = sha(commits[: commits.index(files) + 1])
        if kind == "tree":
            entries = [
                {"type": "file", "path": path, "size": len(data), "oid": sha([path])}
                for path, data in files.items()
            ]
            return self._answer(200, entries)
        if kind == "resolve":
            data = files[file]
            etag = f'"{hashlib.sha1(data).hexdigest()}"'
            return self._answer(200, data, ETag=etag, X_Repo_Commit=commit)
        siblings = [{"rfilename": path} for path in files]
        about = {"id": name, "sha": commit, "private": repository["private"], "siblings": siblings}
        return self._answer(200, about)

    do_HEAD = do_GET


@contextlib.contextmanager
def serving(monkeypatch, directory):
    """A hub that `huggingface_hub` takes for the one there is, with an empty cache and no token."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    files = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)  # which it reads from HF_ENDPOINT at import
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # a protocol of its own
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(directory / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(directory / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()
