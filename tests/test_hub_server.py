"""The test hub, and the real huggingface_hub on it: what tests of pushing and pulling may rely on."""

import hashlib
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hub_fixtures
import pytest
from hub_fixtures import KEEPS_WRONG_BYTES, NEW_CLIENT, RESUMES_AT_ONCE, RETRIED
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    constants,
    create_branch,
    create_commit,
    create_repo,
    create_tag,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    model_info,
    snapshot_download,
    whoami,
)
from huggingface_hub.utils import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

REPO = "me/model"
WEIGHTS = bytes(range(256)) * 40
CARD = b"---\nlicense: mit\ntags:\n- quac\n---\n# A model\n"
EMPTY = "nested/deep/déjà vu.txt"
FILES = {"README.md": CARD, "config.json": b'{"width": 3}', EMPTY: b"", "model.safetensors": WEIGHTS}


def adds(files):
    return [CommitOperationAdd(path, data) for path, data in files.items()]


def pull(file="model.safetensors", **options):
    return Path(hf_hub_download(REPO, file, **options)).read_bytes()


def asked(hub, *methods):
    """Method and last part of the path of each request so far; they are forgotten."""
    requests, hub.requests[:] = list(hub.requests), []
    return [(r.method, r.path.split("?")[0].split("/")[-1]) for r in requests if r.method in (methods or r.method)]


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def status(error):
    """The HTTP status behind an error, which may be wrapped."""
    while getattr(error, "response", None) is None:
        error = error.__cause__
    return error.response.status_code


# push and pull


def test_pushed_bytes_come_back(hub, tmp_path):
    weights = tmp_path / "weights"
    weights.write_bytes(WEIGHTS)
    url = create_repo(REPO)
    assert str(url) == f"{hub.endpoint}/{REPO}"
    commit = create_commit(REPO, adds(FILES | {"model.safetensors": str(weights)}), commit_message="Push")
    assert hub.commits(REPO)[0] == commit.oid
    assert {path: data for path, data in hub.files(REPO).items() if path != ".gitattributes"} == FILES
    cache = Path(constants.HF_HUB_CACHE)
    assert cache.is_relative_to(tmp_path)
    assert not cache.exists()
    for file, data in FILES.items():
        assert pull(file) == data
    assert len(hub.commits(REPO)) == 2  # the first one is the Hub's


def test_a_push_uses_plain_lfs_and_shows_the_token_to_the_hub_only(hub):
    create_repo(REPO)
    create_commit(REPO, adds(FILES), commit_message="Push")
    steps = [("create", "POST"), ("validate-yaml", "POST"), ("main", "POST"), ("batch", "POST")]
    steps += [(sha256(WEIGHTS), "PUT"), ("verify", "POST"), ("main", "POST")]
    pull()
    for method, path, headers in hub.requests:
        assert ("authorization" in headers) == (not path.startswith("/cdn/")), path
        assert "xet" not in path.split("?")[0]
        assert headers["host"] == (hub.cdn if path.startswith("/cdn/") else hub.endpoint).split("//")[1]
        assert method in ("GET", "HEAD", "POST", "PUT")
    assert [(name, method) for method, name in asked(hub, "POST", "PUT")][: len(steps)] == steps


def test_what_is_there_already_is_not_uploaded_again(hub):
    create_repo(REPO)
    first = create_commit(REPO, adds(FILES), commit_message="Push")
    hub.requests.clear()
    again = create_commit(REPO, adds(FILES), commit_message="Push again")
    assert not asked(hub, "PUT")
    assert hub.commits(REPO)[0] == again.oid == first.oid


def test_snapshot_download(hub):
    sha = hub.add(REPO, FILES)
    folder = Path(snapshot_download(REPO, allow_patterns=["*.json", "nested/*"]))
    assert folder.name == sha
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert found == {"config.json", EMPTY}
    assert Path(snapshot_download(REPO)) == folder
    assert {path: (folder / path).read_bytes() for path in FILES} == FILES


def test_revisions(hub):
    old = hub.add(REPO, {"model.safetensors": b"old"})
    create_tag(REPO, tag="v1")
    create_branch(REPO, branch="feature/x", revision="v1")
    side = create_commit(REPO, adds({"model.safetensors": b"side"}), commit_message="Side", revision="feature/x").oid
    new = hub.add(REPO, {"model.safetensors": b"new"})
    expected = {old: b"old", "v1": b"old", "feature/x": b"side", side: b"side", "main": b"new", None: b"new"}
    assert {revision: pull(revision=revision) for revision in expected} == expected
    assert {Path(snapshot_download(REPO, revision=revision)).name for revision in ("main", "v1")} == {new, old}
    assert hub.commits(REPO, "feature/x") == [side, old]
    assert hub.files(REPO, old) == {"model.safetensors": b"old"}
    refs = HfApi().list_repo_refs(REPO)
    assert {ref.name: ref.target_commit for ref in refs.branches} == {"main": new, "feature/x": side}
    assert {ref.name: ref.target_commit for ref in refs.tags} == {"v1": old}
    with pytest.raises(HfHubHTTPError):
        create_tag(REPO, tag="v1")
    create_tag(REPO, tag="v1", exist_ok=True)
    HfApi().delete_tag(REPO, tag="v1")
    with pytest.raises(RevisionNotFoundError):
        pull(revision="v1", force_download=True)


def test_metadata_and_the_names_of_blobs(hub):
    sha = hub.add(REPO, FILES)
    git = hashlib.sha1(b"blob %d\0" % len(FILES["config.json"]) + FILES["config.json"]).hexdigest()
    for file, etag in (("model.safetensors", sha256(WEIGHTS)), ("config.json", git)):
        metadata = get_hf_file_metadata(hf_hub_url(REPO, file))
        assert (metadata.etag, metadata.size, metadata.commit_hash) == (etag, len(FILES[file]), sha)
        assert metadata.location.startswith(hub.cdn if file == "model.safetensors" else hub.endpoint)
        assert Path(hf_hub_download(REPO, file)).resolve().name == etag


def test_what_the_api_says_of_a_repo(hub):
    create_repo(REPO, private=True)
    sha = create_commit(REPO, adds(FILES), commit_message="Push", commit_description="All").oid
    info = model_info(REPO, files_metadata=True)
    assert (info.id, info.sha, info.private, info.gated) == (REPO, sha, True, False)
    assert {file.rfilename: file.size for file in info.siblings if file.rfilename in FILES} == {
        path: len(data) for path, data in FILES.items()
    }
    lfs = {file.rfilename: file.lfs["sha256"] for file in info.siblings if file.lfs}
    assert lfs == {"model.safetensors": sha256(WEIGHTS)}
    tree = {entry.path: entry for entry in HfApi().list_repo_tree(REPO, recursive=True)}
    assert set(tree) == {*FILES, ".gitattributes", "nested", "nested/deep"}
    assert tree["model.safetensors"].lfs["sha256"] == sha256(WEIGHTS)
    assert {entry.path for entry in HfApi().list_repo_tree(REPO)} == {path.split("/")[0] for path in tree}
    assert [entry.path for entry in HfApi().list_repo_tree(REPO, "nested")] == ["nested/deep"]
    assert [entry.path for entry in HfApi().get_paths_info(REPO, ["config.json", "none"])] == ["config.json"]
    last = HfApi().list_repo_commits(REPO)[0]
    assert (last.commit_id, last.title, last.message, last.authors) == (sha, "Push", "All", ["me"])
    assert whoami()["name"] == "me"
    HfApi().delete_repo(REPO)
    assert hub.repos == {}


def test_model_cards(hub):
    create_repo(REPO)
    create_commit(REPO, adds({"README.md": str(ModelCard(CARD.decode())).encode()}), commit_message="Card")
    card = ModelCard.load(REPO)
    assert (card.data.license, card.data.tags) == ("mit", ["quac"])
    with pytest.raises(ValueError, match="Invalid metadata"):
        create_commit(REPO, adds({"README.md": b"---\nno mapping\n---\n"}), commit_message="Bad")
    with pytest.warns(UserWarning, match="missing yaml metadata"):
        create_commit(REPO, adds({"README.md": b"# No metadata\n"}), commit_message="Bare")
    assert hub.files(REPO)["README.md"] == b"# No metadata\n"


# who may


def test_repos_are_made_once_and_in_ones_own_namespace(hub):
    create_repo(REPO)
    assert str(create_repo(REPO, exist_ok=True)) == f"{hub.endpoint}/{REPO}"
    for error, repo, token in ((409, REPO, None), (403, "you/model", None), (403, "me/other", "hf_read")):
        with pytest.raises(HfHubHTTPError) as caught:
            create_repo(repo, token=token)
        assert status(caught.value) == error
    hub.orgs["me"] = ["team"]
    assert create_repo("team/model").repo_id == "team/model"
    assert set(hub.repos) == {REPO, "team/model"}


@pytest.mark.parametrize(("token", "error"), [("hf_read", 403), ("hf_other", 403), ("hf_bad", 401), (None, 401)])
def test_pushes_need_a_token_that_may_write(hub, monkeypatch, token, error):
    hub.add(REPO, FILES)
    monkeypatch.setenv("HF_TOKEN", token or "")
    with pytest.raises(HfHubHTTPError) as caught:
        create_commit(REPO, adds({"config.json": b"{}"}), commit_message="Push")
    assert status(caught.value) == error
    assert len(hub.commits(REPO)) == 1


@pytest.mark.parametrize(
    ("repo", "file", "revision", "error"),
    [
        (REPO, "none.txt", None, EntryNotFoundError),
        (REPO, "config.json", "none", RevisionNotFoundError),
        (REPO, "config.json", "0" * 40, RevisionNotFoundError),
        ("me/none", "config.json", None, RepositoryNotFoundError),
        ("you/private", "config.json", None, RepositoryNotFoundError),
        ("you/gated", "config.json", None, GatedRepoError),
    ],
)
@pytest.mark.parametrize("token", ["hf_good", ""])
def test_refusals_have_the_classes_of_the_real_hub(hub, monkeypatch, repo, file, revision, error, token):
    hub.add(REPO, FILES)
    hub.add("you/private", FILES, private=True)
    hub.add("you/gated", FILES, gated=True)
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(error) as caught:
        hf_hub_download(repo, file, revision=revision)
    assert not isinstance(caught.value, LocalEntryNotFoundError)
    expected = 404
    if repo.startswith("you/") or repo == "me/none":
        expected = 401 if not token else 403 if error is GatedRepoError else 404
    assert status(caught.value) == expected
    if error is RepositoryNotFoundError:
        with pytest.raises(RepositoryNotFoundError):
            model_info(repo)
    if error is GatedRepoError:
        assert model_info(repo).gated == "auto"
        hub.repos[repo].readers.add("me")
        if token:
            assert Path(hf_hub_download(repo, file)).read_bytes() == FILES[file]


def test_a_wrong_token_is_refused_even_for_public_files(hub, monkeypatch):
    hub.add(REPO, FILES)
    monkeypatch.setenv("HF_TOKEN", "hf_bad")
    with pytest.raises(HfHubHTTPError, match="Invalid credentials") as caught:
        pull()
    assert status(caught.value) == 401
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        model_info(REPO)
    with pytest.raises(OSError, match="Invalid user token"):
        whoami()
    monkeypatch.delenv("HF_TOKEN")
    assert pull() == WEIGHTS


# commits


def test_a_commit_is_all_or_nothing_and_may_insist_on_its_parent(hub):
    parent = hub.add(REPO, FILES)
    for refused, options, operations in (
        (412, {"parent_commit": "0" * 40}, adds({"new": b"1"})),
        (400, {"create_pr": True}, adds({"new": b"1"})),
        (404, {"revision": "none"}, adds({"new": b"1"})),
        (404, {}, [*adds({"new": b"1"}), CommitOperationDelete("none")]),
    ):
        with pytest.raises(HfHubHTTPError) as caught:
            create_commit(REPO, operations, commit_message="No", **options)
        assert status(caught.value) == refused
        assert hub.commits(REPO) == [parent]
    operations = [*adds({"new": b"1"}), CommitOperationDelete("nested/"), CommitOperationDelete("config.json")]
    sha = create_commit(REPO, operations, commit_message="Yes", parent_commit=parent).oid
    assert hub.commits(REPO) == [sha, parent]
    assert set(hub.files(REPO)) == {"new", "README.md", "model.safetensors"}
    assert hub.files(REPO, parent) == FILES


def test_commits_at_once_are_put_in_a_row(hub):
    hub.add(REPO, FILES)
    new = {f"{i}.safetensors": bytes([i]) * 1000 for i in range(8)}
    with ThreadPoolExecutor(8) as pool:
        work = [pool.submit(create_commit, REPO, adds({p: d}), commit_message=p) for p, d in new.items()]
        shas = {done.result().oid for done in work}
    assert set(hub.commits(REPO)[:8]) == shas
    assert hub.files(REPO) == FILES | new


# faults


@pytest.mark.parametrize("code", [429, 500, 503])
@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_downloads_after_an_error_of_the_hub(hub, hub_waits, method, code):
    hub.add(REPO, FILES)
    hub.fail(method, "config.json", code, times=2)
    if code in RETRIED[method]:
        assert pull("config.json") == FILES["config.json"]
        # the new client repeats the first HEAD at once
        assert hub_waits == ([1] if method == "HEAD" and NEW_CLIENT else [1, 2])
        return
    with pytest.raises(LocalEntryNotFoundError if method == "HEAD" else HfHubHTTPError) as caught:
        pull("config.json")
    assert status(caught.value.__cause__ if method == "HEAD" else caught.value) == code
    assert hub_waits == []
    hub.heal()
    assert pull("config.json") == FILES["config.json"]


def test_a_hub_that_stays_broken_is_given_up_and_then_the_cache_is_good_enough(hub, hub_waits):
    hub.add(REPO, FILES)
    pull("config.json")
    hub.fail("*", "", 503, times=None)
    assert pull("config.json") == FILES["config.json"]
    with pytest.raises(LocalEntryNotFoundError):
        pull()
    assert hub_waits == ([1, 2, 4, 8, 8] if RETRIED["HEAD"] else [])
    hub.heal()
    hub.stop()
    assert pull("config.json") == FILES["config.json"]
    with pytest.raises(LocalEntryNotFoundError):
        pull()


@pytest.mark.parametrize("code", [429, 500])
@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/preupload/"), ("POST", "/batch"), ("PUT", "/upload/"), ("POST", "/verify"), ("POST", "/commit/")],
)
def test_pushes_after_an_error_of_the_hub(hub, hub_waits, method, path, code):
    before = hub.add(REPO, {"config.json": b"{}"})
    hub.fail(method, path, code)
    if code in RETRIED[method] and path != "/commit/":
        create_commit(REPO, adds(FILES), commit_message="Push")
        assert hub_waits == [1]
        assert hub.files(REPO) == FILES
        return
    with pytest.raises((HfHubHTTPError, RuntimeError)) as caught:  # RuntimeError around those of LFS uploads
        create_commit(REPO, adds(FILES), commit_message="Push")
    assert status(caught.value) == code
    assert hub.commits(REPO) == [before]
    create_commit(REPO, adds(FILES), commit_message="Push")
    assert hub.files(REPO) == FILES


def test_a_commit_can_happen_although_its_answer_is_an_error(hub):
    before = hub.add(REPO, {"config.json": b"{}"})
    hub.fail("POST", "/commit/", 500, done=True)
    with pytest.raises(HfHubHTTPError):
        create_commit(REPO, adds(FILES), commit_message="Push", parent_commit=before)
    assert hub.files(REPO) == FILES
    with pytest.raises(HfHubHTTPError) as caught:
        create_commit(REPO, adds({"config.json": b"[]"}), commit_message="Push", parent_commit=before)
    assert status(caught.value) == 412


def test_an_upload_that_breaks_off_is_sent_again_from_its_start(hub, hub_waits):
    hub.add(REPO, {"config.json": b"{}"})
    hub.drop("/upload/", after=1000, method="PUT")
    create_commit(REPO, adds(FILES), commit_message="Push")
    assert hub.files(REPO) == FILES
    assert hub_waits == [1]


def test_a_download_that_breaks_off_is_resumed(hub, hub_waits):
    chunk = constants.DOWNLOAD_CHUNK_SIZE
    data = os.urandom(chunk // 4) * 5
    hub.add(REPO, {"model.safetensors": data})
    hub.drop("model.safetensors", after=chunk + 1000)
    if not RESUMES_AT_ONCE:
        with pytest.raises(OSError, match="IncompleteRead"):
            pull()
    assert pull() == data
    ranges = [headers.get("range") for method, path, headers in hub.requests if method == "GET"]
    assert ranges == [None, f"bytes={chunk}-"]
    assert hub_waits == ([1] if RESUMES_AT_ONCE else [])


def test_the_client_compares_sizes_and_nothing_else(hub):
    hub.add(REPO, FILES)
    for file, data in FILES.items():
        if data:
            hub.replace(REPO, file, b"?" * (len(data) + 1))
            with pytest.raises(OSError, match="Consistency check failed"):
                pull(file)
            hub.replace(REPO, file, b"?" * len(data))
            assert pull(file, force_download=True) == b"?" * len(data)
    path = Path(hf_hub_download(REPO, "model.safetensors"))
    assert path.resolve().name == sha256(WEIGHTS)  # the blob has the name of the bytes it should have
    hub.heal()
    assert pull() != WEIGHTS  # and stays
    assert pull(force_download=True) == WEIGHTS


def test_what_a_short_file_leaves_behind(hub):
    hub.add(REPO, FILES)
    hub.replace(REPO, "model.safetensors", b"?" * 1000)
    with pytest.raises(OSError, match="Consistency check failed"):
        pull()
    hub.heal()
    assert pull() == (b"?" * 1000 + WEIGHTS[1000:] if KEEPS_WRONG_BYTES else WEIGHTS)
    assert pull(force_download=True) == WEIGHTS


def test_a_file_can_change_under_its_commit(hub):
    sha = hub.add(REPO, FILES)
    hub.replace(REPO, "model.safetensors", b"changed", keep_etag=False)
    metadata = get_hf_file_metadata(hf_hub_url(REPO, "model.safetensors"))
    assert (metadata.etag, metadata.size, metadata.commit_hash) == (sha256(b"changed"), 7, sha)
    assert pull() == b"changed"


def test_a_late_answer(hub):
    hub.add(REPO, FILES)
    pull("config.json")
    hub.delay("/resolve/", seconds=0.6, times=1)
    assert pull("config.json", etag_timeout=0.2) == FILES["config.json"]  # from the cache
    hub.delay("/resolve/", seconds=0.1)
    assert pull() == WEIGHTS


# processes

DOWNLOAD = """
import hashlib, sys
from huggingface_hub import hf_hub_download
path = hf_hub_download(sys.argv[1], sys.argv[2])
print(hashlib.sha256(open(path, "rb").read()).hexdigest())
"""

PUSH_AND_PULL = """
import json
from huggingface_hub import CommitOperationAdd, create_commit, create_repo, hf_hub_download, whoami
create_repo("me/there")
create_commit("me/there", [CommitOperationAdd("a.safetensors", b"abc"), CommitOperationAdd("a.json", b"{}")],
              commit_message="Push")
files = {name: open(hf_hub_download("me/there", name)).read() for name in ("a.safetensors", "a.json")}
print(json.dumps({"me": whoami()["name"], **files}))
"""

OFFLINE = """
from huggingface_hub import create_repo, hf_hub_download, model_info
from huggingface_hub.utils import LocalEntryNotFoundError, OfflineModeIsEnabled
print(open(hf_hub_download("me/model", "config.json")).read())
for call, error in (
    (lambda: hf_hub_download("me/model", "model.safetensors"), LocalEntryNotFoundError),
    (lambda: model_info("me/model"), OfflineModeIsEnabled),
    (lambda: create_repo("me/new"), OfflineModeIsEnabled),
):
    try:
        call()
    except error:
        print("refused")
"""


def start(code, env, *arguments):
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def output(process):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out.strip()


def test_a_process_with_the_environment_and_nothing_else(hub_server, hub_env, tmp_path):
    said = json.loads(output(start(PUSH_AND_PULL, hub_env)))
    assert said == {"me": "me", "a.safetensors": "abc", "a.json": "{}"}
    assert hub_server.files("me/there")["a.safetensors"] == b"abc"
    assert (Path(hub_env["HF_HOME"]) / "hub" / "models--me--there").is_dir()
    assert Path(hub_env["HF_HOME"]).is_relative_to(tmp_path)


def test_two_processes_that_download_at_once(hub_server, hub_env):
    data = os.urandom(1 << 20) * 4
    hub_server.add(REPO, {"model.safetensors": data})
    hub_server.delay("/cdn/", seconds=0.5)
    both = [start(DOWNLOAD, hub_env, REPO, "model.safetensors") for _ in range(2)]
    assert [output(process) for process in both] == [sha256(data)] * 2
    blobs = Path(hub_env["HF_HOME"]) / "hub" / "models--me--model" / "blobs"
    assert [path.name for path in blobs.iterdir()] == [sha256(data)]


def test_an_offline_process_has_what_is_in_its_cache(hub_server, hub_env):
    hub_server.add(REPO, FILES)
    assert output(start(DOWNLOAD, hub_env, REPO, "config.json")) == sha256(FILES["config.json"])
    hub_server.requests.clear()
    said = output(start(OFFLINE, hub_env | {"HF_HUB_OFFLINE": "1"}))
    assert said.split("\n") == [FILES["config.json"].decode(), "refused", "refused", "refused"]
    assert hub_server.requests == []


def test_the_client_of_this_process_is_given_back(hub_server, monkeypatch, tmp_path):
    names = ("ENDPOINT", "HUGGINGFACE_CO_URL_TEMPLATE", "HF_HUB_CACHE", "HF_TOKEN_PATH", "HF_HUB_OFFLINE")
    before = [getattr(constants, name) for name in names]
    url = hf_hub_url(REPO, "config.json")
    for name, value in hub_fixtures.client_environment(hub_server, tmp_path).items():
        monkeypatch.setenv(name, value)
    with hub_fixtures.client_of_this_process():
        assert constants.HF_HUB_OFFLINE is False
        assert hf_hub_url(REPO, "config.json") == f"{hub_server.endpoint}/{REPO}/resolve/main/config.json"
        assert HfApi().endpoint == hub_server.endpoint
    assert [getattr(constants, name) for name in names] == before
    assert hf_hub_url(REPO, "config.json") == url
    assert HfApi().endpoint == before[0]


# the server itself


def fetch(url, **headers):
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
        urllib.request.Request(url, headers=headers), timeout=10
    ) as answer:
        return answer.status, answer.headers.get("Content-Range"), answer.read()


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_ranges(hub_server, file):
    hub_server.add(REPO, FILES)
    url, data = f"{hub_server.endpoint}/{REPO}/resolve/main/{file}", FILES[file]
    size = len(data)
    assert fetch(url) == (200, None, data)
    assert fetch(url, Range="bytes=2-4") == (206, f"bytes 2-4/{size}", data[2:5])
    assert fetch(url, Range="bytes=5-") == (206, f"bytes 5-{size - 1}/{size}", data[5:])
    assert fetch(url, Range="bytes=-3") == (206, f"bytes {size - 3}-{size - 1}/{size}", data[-3:])
    assert fetch(url, Range=f"bytes=2-{size + 5}") == (206, f"bytes 2-{size - 1}/{size}", data[2:])
    with pytest.raises(urllib.error.HTTPError) as caught:
        fetch(url, Range=f"bytes={size}-")
    assert (caught.value.code, caught.value.headers["Content-Range"]) == (416, f"bytes */{size}")


def test_what_it_does_not_speak_it_says(hub_server):
    with pytest.raises(urllib.error.HTTPError) as caught:
        fetch(f"{hub_server.endpoint}/api/models/{REPO}/discussions")
    assert caught.value.code == 501
    assert "discussions" in json.loads(caught.value.read())["error"]
    assert hub_server.requests[0][:2] == ("GET", f"/api/models/{REPO}/discussions")
