"""A stand-in for the Hub on the loopback: as much of its HTTP API as uploading and loading a model takes.

Large files come by the Git LFS protocol, which huggingface_hub speaks when Xet is switched off (`environment`).
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from urllib.parse import unquote, urlsplit

TOKEN, READ_ONLY = "hf_of_somebody", "hf_that_may_only_read"
LARGE = (".safetensors",)


@dataclass
class Repository:
    """Files by their path, and what was sent.

    Attributes:
        commits: each the header and the operations of one commit.
    """

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[list[dict]] = field(default_factory=list)

    @property
    def sha(self) -> str:
        return hashlib.sha1(str(len(self.commits)).encode()).hexdigest()


@dataclass
class Hub:
    """What the stand-in holds.

    Attributes:
        address: of its API.
        objects: large files by their SHA-256.
        requests: method and path of each, in their order.
        refused: names of repositories that take no commit.
    """

    address: str
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    refused: set[str] = field(default_factory=set)

    def environment(self, token: str | None = TOKEN) -> dict[str, str]:
        """Variables of a process that is to take this for the Hub."""
        known = {} if token is None else {"HF_TOKEN": token}
        return {"HF_ENDPOINT": self.address, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"} | known


@contextmanager
def hub_stand_in() -> Iterator[Hub]:
    """Serve until the block ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.hub = Hub(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> Hub:
        return self.server.hub

    def log_message(self, *_) -> None:
        """Nothing on the terminal."""

    def do_GET(self) -> None:
        path = self._path()
        if path == "/api/whoami-v2":
            self._whoami()
        elif path.startswith("/api/models/"):
            self._repository(path.removeprefix("/api/models/"))
        else:
            self._file(path)

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        data, digest = self._body(), PurePosixPath(self._path()).name
        if hashlib.sha256(data).hexdigest() != digest:
            self._answer({"error": "other contents"}, status=400)
            return
        self.hub.objects[digest] = data
        self._answer({})

    def do_POST(self) -> None:
        path, body = self._path(), self._body()
        if self._token() != TOKEN:
            self._answer({"error": "may not write"}, status=403)
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif path.endswith("/info/lfs/objects/batch"):
            self._large_files(json.loads(body)["objects"])
        elif "/preupload/" in path:
            files = json.loads(body)["files"]
            modes = {file["path"]: "lfs" if file["path"].endswith(LARGE) else "regular" for file in files}
            self._answer(
                {"files": [{"path": name, "uploadMode": m, "shouldIgnore": False} for name, m in modes.items()]}
            )
        elif "/commit/" in path:
            self._commit(path.removeprefix("/api/models/").partition("/commit/")[0], body)
        else:
            self._answer({"error": path}, status=404)

    def _path(self) -> str:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        return path

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def _answer(self, value: object, status: int = 200, **headers: str) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _whoami(self) -> None:
        if self._token() not in (TOKEN, READ_ONLY):
            self._answer({"error": "Invalid credentials"}, status=401)
            return
        role = "write" if self._token() == TOKEN else "read"
        self._answer({"name": "somebody", "type": "user", "auth": {"accessToken": {"role": role}}})

    def _create(self, asked: dict) -> None:
        name = f"{asked.get('organization') or 'somebody'}/{asked['name']}"
        if name in self.hub.repositories:
            self._answer({"error": "exists", "url": f"{self.hub.address}/{name}"}, status=409)
            return
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.repositories[name] = Repository(private, {".gitattributes": b""})
        self._answer({"url": f"{self.hub.address}/{name}", "name": name, "id": name})

    def _large_files(self, objects: list[dict]) -> None:
        answers = []
        for wanted in objects:
            upload = {"upload": {"href": f"{self.hub.address}/objects/{wanted['oid']}", "header": {}}}
            known = wanted["oid"] in self.hub.objects
            answers.append({"oid": wanted["oid"], "size": wanted["size"]} | ({} if known else {"actions": upload}))
        self._answer({"transfer": "basic", "objects": answers})

    def _commit(self, name: str, body: bytes) -> None:
        if name in self.hub.refused:
            self._answer({"error": "refused"}, status=403)
            return
        repository = self.hub.repositories[name]
        operations = [json.loads(line) for line in body.splitlines()]
        for operation in operations:
            kind, value = operation["key"], operation["value"]
            if kind == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                repository.files[value["path"]] = self.hub.objects[value["oid"]]
            elif kind == "deletedFile":
                del repository.files[value["path"]]
        repository.commits.append(operations)
        address = f"{self.hub.address}/{name}/commit/{repository.sha}"
        self._answer({"commitUrl": address, "commitOid": repository.sha, "success": True})

    def _repository(self, path: str) -> None:
        name = "/".join(path.split("/")[:2])
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and self._token() != TOKEN):
            self._answer({"error": "Repository not found"}, status=401, X_Error_Code="RepoNotFound")
        elif "/tree/" in path:
            self._answer(
                [
                    {"type": "file", "path": file, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for file, data in repository.files.items()
                ]
            )
        else:
            siblings = [{"rfilename": file} for file in repository.files]
            about = {"id": name, "modelId": name, "sha": repository.sha, "private": repository.private}
            self._answer(about | {"siblings": siblings, "tags": [], "downloads": 0, "likes": 0})

    def _file(self, path: str) -> None:
        name, _, rest = path.lstrip("/").partition("/resolve/")
        file = rest.partition("/")[2]
        repository = self.hub.repositories.get(name)
        if repository is None or file not in repository.files:
            code = "RepoNotFound" if repository is None else "EntryNotFound"
            self._answer({"error": code}, status=404, X_Error_Code=code)
            return
        data = repository.files[file]
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X_Repo_Commit": repository.sha}
        self._answer(data, **headers, X_Linked_Size=str(len(data)))
