"""A Hugging Face Hub for tests: model repos in memory behind the Hub's own HTTP protocol.

It speaks what huggingface_hub asks for when models are pushed and pulled:

- /api: whoami-v2, repos/create, repos/delete, validate-yaml, and below models/{org}/{name}: the repo's info, tree,
  paths-info, refs, commits, branch, tag, preupload and commit;
- /{org}/{name}.git/info/lfs/objects/batch with the transfer "basic", and its verify;
- /{org}/{name}/resolve/{revision}/{path}: small files at once, LFS files by a redirect to a CDN. The CDN is a second
  port, because clients follow redirects on one origin, and keep their token there; uploads of LFS files go to it too.

Not here: Xet (a client that has hf_xet needs HF_HUB_DISABLE_XET=1 to upload), multipart uploads, pull requests,
datasets and spaces, pages of long listings, gzip.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from datetime import datetime, timezone
from urllib.parse import parse_qs, quote, unquote

from hub_faults import Faults, Listener, Refused, Reply, Request

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".onnx", ".npy", ".npz", ".pkl", ".h5", ".zip", ".gz")
LFS_SIZE = 10 * 1024 * 1024  # larger files are LFS files whatever their name
ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()
LFS_JSON = "application/vnd.git-lfs+json"


def git_sha(kind, data):
    return hashlib.sha1(f"{kind} {len(data)}\0".encode() + data).hexdigest()


def is_lfs(path, size):
    return size > LFS_SIZE or path.endswith(LFS_SUFFIXES)


class File:
    def __init__(self, data, lfs):
        self.data, self.lfs, self.size = data, lfs, len(data)
        self.sha256 = hashlib.sha256(data).hexdigest()
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n".encode()
        self.pointer_size = len(pointer)
        self.blob_id = git_sha("blob", pointer if lfs else data)
        self.etag = self.sha256 if lfs else self.blob_id

    def entry(self, path):
        entry = {"type": "file", "oid": self.blob_id, "size": self.size, "path": path}
        if self.lfs:
            entry["lfs"] = {"oid": self.sha256, "size": self.size, "pointerSize": self.pointer_size}
        return entry

    def sibling(self, path, blobs):
        if not blobs:
            return {"rfilename": path}
        lfs = {"sha256": self.sha256, "size": self.size, "pointerSize": self.pointer_size}
        return {"rfilename": path, "size": self.size, "blobId": self.blob_id, **({"lfs": lfs} if self.lfs else {})}


@dataclass
class Commit:
    sha: str
    parent: str | None
    files: dict[str, File]
    title: str
    description: str
    author: str
    date: str


@dataclass
class Repo:
    name: str
    private: bool = False
    gated: bool = False
    readers: set = field(default_factory=set)  # users let in although it is private or gated
    objects: dict[str, bytes] = field(default_factory=dict)  # uploaded LFS files by sha256
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def at(self, revision):
        sha = self.branches.get(revision) or self.tags.get(revision) or revision
        if sha not in self.commits:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[sha]

    def commit(self, branch, files, title, description="", author="me"):
        """Put a commit with exactly these files on a branch."""
        parent = self.branches.get(branch)
        date = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        tree = sorted((path, file.blob_id) for path, file in files.items())
        sha = git_sha("commit", json.dumps([parent, len(self.commits), self.name, date, title, tree]).encode())
        self.objects.update({file.sha256: file.data for file in files.values() if file.lfs})
        self.commits[sha] = Commit(sha, parent, dict(files), title, description, author, date)
        self.branches[branch] = sha
        return sha

    def log(self, revision):
        """The commits that led to a revision, the newest first."""
        commit = self.at(revision)
        while commit is not None:
            yield commit
            commit = self.commits.get(commit.parent)


ROUTES = []


def route(method, path):
    """Answer a path; a part in {braces} reaches the function unquoted."""
    parts = {"repo": "[^/]+/[^/]+", "path": ".+"}
    pattern = re.sub(r"\{(\w+)\}", lambda m: f"(?P<{m[1]}>{parts.get(m[1], '[^/]+')})", path.replace(".", r"\."))

    def register(function):
        ROUTES.append((method, re.compile(pattern), function))
        return function

    return register


class HubServer(Faults):
    """The server: start it with `with HubServer() as hub`, seed it with `hub.add`, look into it with `hub.files`."""

    def __init__(self):
        super().__init__()
        self.tokens = {"hf_good": "me", "hf_read": "me", "hf_other": "someone"}
        self.read_only = {"hf_read"}  # tokens that may not write
        self.orgs: dict[str, list[str]] = {}  # the organizations that a user belongs to
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self.errors: list[str] = []  # tracebacks: the server's own mistakes
        self._listeners = [Listener(self, is_cdn) for is_cdn in (False, True)]
        self.endpoint, self.cdn = (f"http://127.0.0.1:{listener.server_port}" for listener in self._listeners)

    def __enter__(self):
        for listener in self._listeners:
            threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.stop()

    def stop(self):
        """Refuse connections from now on; open ones are closed."""
        listeners, self._listeners = self._listeners, []
        for listener in listeners:
            listener.shutdown()
            listener.server_close()
            listener.hang_up()

    def add(self, repo, files, private=None, gated=None, branch="main"):
        """Commit files (path to bytes) to what is there, if need be to a new repo or branch; the sha."""
        with self.lock:
            kept = self.repos.setdefault(repo, Repo(repo))
            kept.private = kept.private if private is None else private
            kept.gated = kept.gated if gated is None else gated
            if branch not in kept.branches and "main" in kept.branches:
                kept.branches[branch] = kept.branches["main"]
            before = kept.at(branch).files if branch in kept.branches else {}
            new = {path: File(data, is_lfs(path, len(data))) for path, data in files.items()}
            return kept.commit(branch, before | new, "Add files")

    def files(self, repo, revision="main"):
        """Every file at a revision: path to bytes."""
        with self.lock:
            return {path: file.data for path, file in self.repos[repo].at(revision).files.items()}

    def commits(self, repo, revision="main"):
        """The shas of a revision, the newest first."""
        with self.lock:
            return [commit.sha for commit in self.repos[repo].log(revision)]

    def answer(self, call, method, path, is_cdn):
        """The reply to a call; the path is still quoted."""
        for expected, pattern, function in ROUTES:
            match = pattern.fullmatch(path)
            if match and expected == method and is_cdn == path.startswith("/cdn/"):
                with self.lock:
                    reply = function(self, call, **{name: unquote(part) for name, part in match.groupdict().items()})
                if isinstance(reply, Reply):
                    return reply
                return Reply(json.dumps(reply).encode(), headers={"Content-Type": "application/json; charset=utf-8"})
        raise Refused(501, f"the test hub does not serve {method} {path}")

    def user(self, headers):
        """Who asks, and whether they may write. A token that nobody has is refused even where none is needed."""
        scheme, _, token = headers.get("authorization", "").partition(" ")
        if not scheme:
            return None, False
        if token not in self.tokens:
            raise Refused(401, "Invalid credentials in Authorization header")
        return self.tokens[token], token not in self.read_only

    def _owns(self, user, repo):
        return user is not None and repo.split("/")[0] in (user, *self.orgs.get(user, ()))

    def _open(self, call, name, write=False, content=False):
        repo = self.repos.get(name)
        inside = repo is not None and (self._owns(call.user, name) or call.user in repo.readers)
        if repo is None or (repo.private and not inside):
            raise Refused(401 if call.user is None else 404, "Repository not found", "RepoNotFound")
        if content and repo.gated and not inside:
            hint = "Please log in." if call.user is None else "Visit the repo's page to ask for access."
            message = f"Access to model {name} is restricted. You must have access to it to download. {hint}"
            raise Refused(401 if call.user is None else 403, message, "GatedRepo")
        if write:
            self._may_write(call, name)
        return repo

    def _may_write(self, call, repo):
        if call.user is None:
            raise Refused(401, "Invalid username or password.")
        if not self._owns(call.user, repo):
            raise Refused(403, f"You don't have the rights to write to {repo}")
        if not call.can_write:
            raise Refused(403, "This token is read-only: a token with the write role is needed")

    # accounts and repos

    @route("GET", "/api/whoami-v2")
    def _whoami(self, call):
        if call.user is None:
            raise Refused(401, "Invalid username or password.")
        orgs = [{"type": "org", "name": org, "fullname": org} for org in self.orgs.get(call.user, ())]
        access = {"displayName": "test", "role": "write" if call.can_write else "read"}
        auth = {"type": "access_token", "accessToken": access}
        return {"type": "user", "id": call.user, "name": call.user, "fullname": call.user, "orgs": orgs, "auth": auth}

    @route("POST", "/api/repos/create")
    def _create(self, call):
        ask = call.json
        if ask.get("type", "model") != "model":
            raise Refused(400, "The test hub has models only")
        name = f"{ask.get('organization') or call.user}/{ask['name']}"
        self._may_write(call, name)
        made = {"url": f"{self.endpoint}/{name}", "name": name, "id": name}
        if name in self.repos:
            body = json.dumps({**made, "error": "You already created this model repo"}).encode()
            return Reply(body, 409, {"Content-Type": "application/json"})
        private = bool(ask.get("private")) or ask.get("visibility") == "private"  # the older and the newer field
        self.repos[name] = Repo(name, private)
        self.repos[name].commit("main", {".gitattributes": File(ATTRIBUTES, False)}, "initial commit", author=call.user)
        return made

    @route("DELETE", "/api/repos/delete")
    def _delete(self, call):
        name = f"{call.json.get('organization') or call.user}/{call.json['name']}"
        self._open(call, name, write=True)
        del self.repos[name]
        return {}

    @route("POST", "/api/validate-yaml")
    def _validate(self, call):
        """Only what needs no YAML parser: metadata that are there, end, and are lines of a mapping."""
        content, answer = call.json["content"], {"errors": [], "warnings": []}
        lines = content.splitlines()
        if not lines or lines[0].rstrip() != "---":
            answer["warnings"].append({"message": "empty or missing yaml metadata in repo card"})
            return answer
        end = next((i for i, line in enumerate(lines[1:], 1) if line.rstrip() == "---"), None)
        bad = [line for line in lines[1:end] if not re.match(r"\s*$|\s*#|\s*-( |$)|  |[\w\"'. -]+:( |$)", line)]
        if end is None or bad:
            answer["errors"].append({"message": f"bad metadata: {bad[0]!r}" if bad else "the metadata have no end"})
            return Reply(json.dumps(answer).encode(), 400, {"Content-Type": "application/json"})
        return answer

    @route("GET", "/api/models/{repo}")
    @route("GET", "/api/models/{repo}/revision/{revision}")
    def _info(self, call, repo, revision="main"):
        kept = self._open(call, repo)
        commit, first = kept.at(revision), next(iter(kept.commits.values()))
        return {
            **{"_id": git_sha("repo", repo.encode())[:24], "id": repo, "modelId": repo, "author": repo.split("/")[0]},
            **{"sha": commit.sha, "createdAt": first.date, "lastModified": commit.date, "disabled": False},
            **{"private": kept.private, "gated": "auto" if kept.gated else False, "downloads": 0, "likes": 0},
            **{"tags": [], "siblings": [f.sibling(path, "blobs" in call.query) for path, f in commit.files.items()]},
        }

    @route("GET", "/api/models/{repo}/tree/{revision}")
    @route("GET", "/api/models/{repo}/tree/{revision}/{path}")
    def _tree(self, call, repo, revision, path=""):
        commit = self._open(call, repo).at(revision)
        entries = self._entries(commit.files, f"{path}/" if path else "")
        if path and not entries:
            raise Refused(404, f"{path} does not exist on {revision!r}", "EntryNotFound")
        if call.query.get("recursive", "").lower() not in ("true", "1"):
            entries = {name: entry for name, entry in entries.items() if "/" not in name[len(path) :].strip("/")}
        return [entry for _, entry in sorted(entries.items())]

    @route("POST", "/api/models/{repo}/paths-info/{revision}")
    def _paths(self, call, repo, revision):
        wanted = [path.rstrip("/") for path in parse_qs(call.body.decode())["paths"]]
        entries = self._entries(self._open(call, repo).at(revision).files)
        return [entries[path] for path in wanted if path in entries]

    def _entries(self, files, prefix=""):
        entries = {}
        for path, file in files.items():
            if path.startswith(prefix):
                entries[path] = file.entry(path)
                for end in [match.start() for match in re.finditer("/", path)]:
                    if end >= len(prefix):
                        folder = path[:end]
                        entries[folder] = {"type": "directory", "oid": git_sha("tree", folder.encode()), "size": 0}
                        entries[folder]["path"] = folder
        return entries

    @route("GET", "/api/models/{repo}/commits/{revision}")
    def _log(self, call, repo, revision):
        return [
            {"id": c.sha, "title": c.title, "message": c.description, "date": c.date, "authors": [{"user": c.author}]}
            for c in self._open(call, repo).log(revision)
        ]

    @route("GET", "/api/models/{repo}/refs")
    def _refs(self, call, repo):
        kept, answer = self._open(call, repo), {"converts": [], "pullRequests": []}
        for kind, folder, refs in (("branches", "heads", kept.branches), ("tags", "tags", kept.tags)):
            answer[kind] = [{"name": n, "ref": f"refs/{folder}/{n}", "targetCommit": s} for n, s in refs.items()]
        return answer

    @route("POST", "/api/models/{repo}/branch/{name}")
    def _branch(self, call, repo, name):
        kept = self._open(call, repo, write=True)
        return self._refer(kept, kept.branches, name, call.json.get("startingPoint", "main"))

    @route("POST", "/api/models/{repo}/tag/{revision}")
    def _tag(self, call, repo, revision):
        kept = self._open(call, repo, write=True)
        return self._refer(kept, kept.tags, call.json["tag"], revision)

    def _refer(self, kept, refs, name, revision):
        sha = kept.at(revision).sha
        if name in refs:
            raise Refused(409, f"Reference {name!r} already exists")
        refs[name] = sha
        return {}

    @route("DELETE", "/api/models/{repo}/{kind}/{name}")
    def _unrefer(self, call, repo, kind, name):
        kept = self._open(call, repo, write=True)
        refs = {"branch": kept.branches, "tag": kept.tags}.get(kind, {})
        if (kind, name) == ("branch", "main"):
            raise Refused(403, "main cannot be deleted")
        if refs.pop(name, None) is None:
            raise Refused(404, f"Invalid rev id: {name}", "RevisionNotFound")
        return {}

    # uploads

    @route("POST", "/api/models/{repo}/preupload/{branch}")
    def _preupload(self, call, repo, branch):
        here = self._open(call, repo, write=True).at(branch).files
        files = []
        for file in call.json["files"]:
            path, size = file["path"], file["size"]
            mode = {"path": path, "uploadMode": "lfs" if is_lfs(path, size) else "regular", "shouldIgnore": False}
            files.append({**mode, **({"oid": here[path].etag} if path in here else {})})
        return {"files": files}

    @route("POST", "/{repo}.git/info/lfs/objects/batch")
    def _batch(self, call, repo):
        kept = self._open(call, repo, write=True)
        if "basic" not in call.json.get("transfers", ["basic"]):
            raise Refused(400, "The test hub has the transfer 'basic' only")
        objects = []
        for thing in call.json["objects"]:
            actions = {
                "upload": {"href": f"{self.cdn}/cdn/{repo}/upload/{thing['oid']}"},
                "verify": {"href": f"{self.endpoint}/{repo}.git/info/lfs/objects/verify"},
            }
            objects.append({**thing, **({} if thing["oid"] in kept.objects else {"actions": actions})})
        body = json.dumps({"transfer": "basic", "objects": objects}).encode()
        return Reply(body, headers={"Content-Type": LFS_JSON})

    @route("PUT", "/cdn/{repo}/upload/{oid}")
    def _upload(self, call, repo, oid):
        if hashlib.sha256(call.body).hexdigest() != oid:
            raise Refused(400, "BadDigest: the bytes do not have the sha256 that was announced")
        self.repos[repo].objects[oid] = call.body
        return Reply(headers={"ETag": f'"{hashlib.md5(call.body).hexdigest()}"'})

    @route("POST", "/{repo}.git/info/lfs/objects/verify")
    def _verify(self, call, repo):
        found = self._open(call, repo, write=True).objects.get(call.json["oid"])
        if found is None or len(found) != call.json["size"]:
            raise Refused(404, "the object was not uploaded")
        return {}

    @route("POST", "/api/models/{repo}/commit/{branch}")
    def _commit(self, call, repo, branch):
        kept = self._open(call, repo, write=True)
        if "create_pr" in call.query:
            raise Refused(400, "The test hub has no pull requests")
        if branch not in kept.branches:
            raise Refused(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        files, head = dict(kept.at(branch).files), {}
        for line in filter(None, call.body.split(b"\n")):
            item = json.loads(line)
            key, value = item["key"], item["value"]
            path = value.get("path", "")
            if key == "header":
                head = value
            elif key in ("file", "lfsFile") and {"", ".", "..", ".git"} & set(path.split("/")):
                raise Refused(400, f"Bad path: {path!r}")
            elif key == "file":
                content = value["content"]
                data = base64.b64decode(content) if value.get("encoding") == "base64" else content.encode()
                files[path] = File(data, False)
            elif key == "lfsFile":
                data = kept.objects.get(value["oid"])
                if data is None or value.get("size", len(data)) != len(data):
                    raise Refused(400, f"The LFS pointer of {path} points to a file that does not exist")
                files[path] = File(data, True)
            elif key in ("deletedFile", "deletedFolder"):
                inside = [name for name in files if name == path or name.startswith(path.rstrip("/") + "/")]
                gone = inside if key == "deletedFolder" else [name for name in inside if name == path]
                if not gone:
                    raise Refused(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
                files = {name: file for name, file in files.items() if name not in gone}
            else:
                raise Refused(400, f"Unknown operation {key!r}")
        if not head.get("summary"):
            raise Refused(400, "A commit needs a header with a summary")
        if not kept.branches[branch].startswith(head.get("parentCommit", "")):
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        sha = kept.commit(branch, files, head["summary"], head.get("description", ""), call.user)
        url = f"{self.endpoint}/{repo}/commit/{sha}"
        return {"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""}

    # downloads

    @route("GET", "/{repo}/resolve/{revision}/{path}")
    def _resolve(self, call, repo, revision, path):
        commit = self._open(call, repo, content=True).at(revision)
        headers = {"X-Repo-Commit": commit.sha}
        if path not in commit.files:
            raise Refused(404, "Entry not found", "EntryNotFound", headers)
        file, data = self._stored(repo, path, commit)
        if not file.lfs:
            headers |= {**self.etag_of(path, "ETag", file.etag), "Content-Type": "text/plain; charset=utf-8"}
            return Reply(file.data if call.head else data, headers=headers, is_file=True)
        headers |= {
            **self.etag_of(path, "X-Linked-Etag", file.etag),
            "X-Linked-Size": str(file.size),
            "Accept-Ranges": "bytes",
        }
        headers["Location"] = f"{self.cdn}/cdn/{repo}/{commit.sha}/{quote(path)}"
        return Reply(f"Found. Redirecting to {headers['Location']}".encode(), 302, headers)

    @route("GET", "/cdn/{repo}/{sha}/{path}")
    def _cdn_file(self, call, repo, sha, path):
        data = self._stored(repo, path, self.repos[repo].commits[sha])[1]
        headers = {"ETag": f'"{hashlib.md5(data).hexdigest()}"', "Content-Type": "binary/octet-stream"}
        name = path.rsplit("/", 1)[-1]
        headers["Content-Disposition"] = f"inline; filename*=UTF-8''{quote(name)}; filename=\"{quote(name)}\";"
        return Reply(data, headers=headers, is_file=True)

    def _stored(self, repo, path, commit):
        """What a file is said to be, and the bytes that are sent for it."""
        file = commit.files[path]
        data, keep_etag = self._replaced.get((repo, path), (file.data, True))
        return (file if keep_etag else File(data, file.lfs)), data
