"""A small hub of models on the loopback: the protocol of the Hugging Face hub's API as far as
huggingface_hub's downloads, create_repo and create_commit go through it.

    python tests/hub_server.py PORT     # one in memory; HF_ENDPOINT, HF_TOKEN=secret
"""

import base64
import hashlib
import json
import re
import sys
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "secret"


@dataclass
class Repo:
    private: bool
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)
    """Id and files of each, the newest last, which is main."""
    tags: dict[str, str] = field(default_factory=dict)

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        revision = self.tags.get(revision, revision)
        if revision == "main":
            return self.commits[-1] if self.commits else ("0" * 40, {})
        return next((commit for commit in self.commits if commit[0] == revision), None)


class Hub(ThreadingHTTPServer):
    """Starts at once; `log` has a line a request."""

    daemon_threads = True

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.log: list[str] = []


class Handler(BaseHTTPRequestHandler):
    server: Hub

    ROUTES = (
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/revision/(?P<revision>[^/]+)", "about"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/main", "preupload"),
        ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
        ("PUT", r"/large/(?P<oid>\w+)", "put_large"),
        ("GET", r"/large/(?P<oid>\w+)", "get_large"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/main", "commit"),
        ("GET", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)", "resolve"),
    )

    def handle_any(self) -> None:
        self.server.log.append(f"{self.command} {self.path}")
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        verb = "GET" if self.command == "HEAD" else self.command
        for method, pattern, name in self.ROUTES:
            if method == verb and (match := re.fullmatch(pattern, self.path)):
                writes = verb != "GET" and name != "put_large"  # whose address is a secret itself
                if writes and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    return self.answer({"error": "Invalid username or password."}, 401)
                return getattr(self, name)(**match.groupdict())
        return self.answer({"error": f"no {self.path}"}, 404)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any  # noqa: N815

    def answer(self, content: object, status: int = 200, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        said = {"url": f"{self.server.url}/{name}", "name": name}
        if name in self.server.repos:
            return self.answer({"error": "You already created this model repo", **said}, 409)
        self.server.repos[name] = Repo(asked["private"])
        return self.answer(said)

    def validate(self) -> None:
        metadata = json.loads(self.body)["content"]
        wrong = [] if metadata.startswith("---\n") else [{"message": "no metadata"}]
        self.answer({"errors": wrong, "warnings": []})

    def preupload(self, repo: str) -> None:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(self.body)["files"]
        ]
        self.answer({"files": files})

    def batch(self, repo: str) -> None:
        objects = json.loads(self.body)["objects"]
        for one in objects:
            if one["oid"] not in self.server.large:
                href = f"{self.server.url}/large/{one['oid']}"
                one["actions"] = {"upload": {"href": href}}
        self.answer({"transfer": "basic", "objects": objects})

    def put_large(self, oid: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.server.large[oid] = self.body
        self.answer({})

    def get_large(self, oid: str) -> None:
        self.answer(self.server.large[oid])

    def commit(self, repo: str) -> None:
        there = self.server.repos[repo]
        files = dict(there.at("main")[1])  # type: ignore[index]
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
        oid = hashlib.sha1(f"{repo} {len(there.commits)}".encode()).hexdigest()
        there.commits.append((oid, files))
        self.answer({"commitUrl": f"{self.server.url}/{repo}/commit/{oid}", "commitOid": oid})

    def find(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Of that revision; None when it is answered that there is none."""
        there = self.server.repos.get(repo)
        reader = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if there is None or (there.private and not reader):
            self.answer({"error": "Repository not found"}, 401, X_Error_Code="RepoNotFound")
            return None
        if (commit := there.at(revision)) is None:
            self.answer({"error": "no"}, 404, X_Error_Code="RevisionNotFound")
        return commit

    def about(self, repo: str, revision: str) -> None:
        if commit := self.find(repo, revision):
            files = [{"rfilename": name} for name in commit[1]]
            self.answer({"id": repo, "sha": commit[0], "siblings": files})

    def resolve(self, repo: str, revision: str, file: str) -> None:
        if (commit := self.find(repo, revision)) is None:
            return
        oid, files = commit
        if file not in files:
            missing = {"X_Error_Code": "EntryNotFound", "X_Repo_Commit": oid}
            self.answer({"error": "Entry not found"}, 404, **missing)
            return
        digest = hashlib.sha256(files[file]).hexdigest()
        headers = {"X_Repo_Commit": oid, "ETag": f'"{digest}"'}
        if digest in self.server.large:
            headers |= {"X_Linked_Etag": f'"{digest}"', "X_Linked_Size": str(len(files[file]))}
            headers["Location"] = f"{self.server.url}/large/{digest}"
            self.answer(b"", 302, **headers)
        else:
            self.answer(files[file], **headers)

    def log_message(self, *_: object) -> None:
        pass


if __name__ == "__main__":
    Hub(int(sys.argv[1])).serve_forever()
