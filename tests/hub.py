"""A hub on this machine: the few addresses of the Hugging Face hub that an upload and a download ask for."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FakeHub:
    """Serves repositories from memory at ``url``; ``files`` is repository -> revision -> path -> content."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, dict[str, bytes]]] = {}
        self.requests: list[str] = []
        hub = self

        class Handler(_Handler):
            files, requests = hub.files, hub.requests

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        Handler.url = self.url
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    files: dict[str, dict[str, dict[str, bytes]]]
    requests: list[str]
    url: str
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, content: object, code: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _missing(self, code: str) -> None:
        self._answer({"error": code}, 404, X_Error_Code=code, X_Error_Message=code)

    def do_POST(self) -> None:
        self.requests.append(f"POST {self.path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path == "/api/repos/create":
            given = json.loads(body)
            name = f"{given.get('organization') or 'me'}/{given['name'].rpartition('/')[2]}"
            self.files.setdefault(name, {"main": {}})
            self._answer({"url": f"{self.url}/{name}", "name": name, "id": name})
            return
        if self.path == "/api/validate-yaml":  # of a model card
            self._answer({"errors": [], "warnings": []})
            return
        _, _, _, owner, name, verb, revision = self.path.partition("?")[0].split("/")[:7]
        repository = self.files[f"{owner}/{name}"]
        if verb == "branch":
            repository[revision] = dict(repository["main"])
            self._answer({})
        elif verb == "preupload":
            files = json.loads(body)["files"]
            self._answer({"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                                    for file in files]})  # fmt: skip
        elif verb == "commit":
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    repository[revision][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            sha = self._sha(repository[revision])
            self._answer({"success": True, "commitOid": sha, "commitUrl": f"{self.url}/{owner}/{name}/commit/{sha}",
                          "hookOutput": ""})  # fmt: skip

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.requests.append(f"{self.command} {self.path}")
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts == ["api", "whoami-v2"]:
            role = "read" if "reader" in self.headers.get("Authorization", "") else "write"
            self._answer({"name": "me", "orgs": [{"name": "ours"}], "auth": {"accessToken": {"role": role}}})
            return
        if parts[:2] == ["api", "models"]:
            repository = self.files.get("/".join(parts[2:4]))
            revision = parts[5] if len(parts) > 5 else "main"
            found = self._revision(repository, revision)
            if repository is None or found is None:
                self._missing("RepoNotFound" if repository is None else "RevisionNotFound")
            elif parts[4:5] == ["tree"]:
                self._answer([{"type": "file", "path": path, "size": len(content), "oid": self._oid(content)}
                              for path, content in found.items()])  # fmt: skip
            else:
                self._answer({"id": "/".join(parts[2:4]), "sha": self._sha(found),
                              "siblings": [{"rfilename": path} for path in found]})  # fmt: skip
            return
        repository = self.files.get("/".join(parts[:2]))
        found = self._revision(repository, parts[3]) if len(parts) > 4 else None
        content = (found or {}).get("/".join(parts[4:]))
        if found is None or content is None:
            self._missing("RepoNotFound" if repository is None else "EntryNotFound")
            return
        self._answer(content, ETag=f'"{self._oid(content)}"', X_Repo_Commit=self._sha(found))

    def _revision(self, repository: dict | None, revision: str) -> dict[str, bytes] | None:
        if repository is None:
            return None
        by_sha = {self._sha(files): files for files in repository.values()}
        return repository.get(revision) or by_sha.get(revision)

    def _sha(self, files: dict[str, bytes]) -> str:
        return hashlib.sha1(json.dumps({path: self._oid(content) for path, content in files.items()},
                                       sort_keys=True).encode()).hexdigest()  # fmt: skip

    def _oid(self, content: bytes) -> str:
        return hashlib.sha1(content).hexdigest()
