"""What is written is written whole, into what a path names, and never over what somebody still needs."""

import errno
import json
import os
import re
import resource
import stat
import threading

import pytest
import timm
from PIL import Image
from skimage import data as photographs
from typer.testing import CliRunner

import quac_plugins as quac
from quac_plugins.commands import app
from quac_plugins.core.files import read_json, write_file
from quac_plugins.fit.sources import few_images
from quac_plugins.images import image_files


def run(*arguments):
    return CliRunner().invoke(app, [str(one) for one in arguments])


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(photographs.astronaut()).resize((48, 40)).save(path)
    return path


def test_a_device_and_a_pipe_are_written_into_and_stay(tmp_path):
    write_file("/dev/null", b"gone")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    os.mkfifo(tmp_path / "pipe")
    read = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    write_file(tmp_path / "pipe", b"through")
    reader.join()
    assert read == [b"through"]
    assert stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode)


def test_standard_output_goes_on_where_it_was(tmp_path):
    """Also behind links, and where it is a file: opened anew, that would be written over from its beginning."""
    (tmp_path / "link").symlink_to("/dev/fd/1")
    with open(tmp_path / "said", "wb") as said:
        kept = os.dup(1)
        os.dup2(said.fileno(), 1)
        try:
            os.write(1, b"before ")
            write_file("/dev/stdout", b"now ")
            write_file(tmp_path / "link", b"and ")
            os.write(1, b"after")
        finally:
            os.dup2(kept, 1)
            os.close(kept)
    assert (tmp_path / "said").read_bytes() == b"before now and after"


def test_a_link_leads_to_what_is_replaced(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    target = tmp_path / "elsewhere" / "kept.json"
    target.write_bytes(b"old")
    target.chmod(0o640)
    (tmp_path / "link").symlink_to(target)
    (tmp_path / "hanging").symlink_to(tmp_path / "elsewhere" / "new.json")
    write_file(tmp_path / "link", b"new")
    write_file(tmp_path / "hanging", b"first")
    assert (tmp_path / "link").is_symlink()
    assert (target.read_bytes(), target.stat().st_mode & 0o777) == (b"new", 0o640)
    assert (tmp_path / "elsewhere" / "new.json").read_bytes() == b"first"
    assert sorted(path.name for path in (tmp_path / "elsewhere").iterdir()) == ["kept.json", "new.json"]


def test_a_disk_without_room_is_told_with_the_file_and_leaves_the_old_one(tmp_path):
    (tmp_path / "report.json").write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match=r"report\.json was not written: no file may become so large") as caught:
            write_file(tmp_path / "report.json", b"x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]
    with pytest.raises(OSError, match=r"/dev/full was not written: the disk is full\. Make room there"):
        write_file("/dev/full", b"x")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 200_000, "nested too deeply"),
        (b"\xff", "utf-8"),
        (b"{", "not JSON"),
        (b" " * 5_000_000, "5000000 bytes"),
    ],
)
def test_json_of_somebody_else_can_be_refused_and_no_more(tmp_path, content, message):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_json(tmp_path / "config.json", most=4 << 20)


# -- pictures


def test_every_picture_is_there_once(tmp_path, photo):
    cat = tmp_path / "cat"
    (cat / "deep").mkdir(parents=True)
    for name in ("b.png", "deep/c.png"):
        (cat / name).write_bytes(photo.read_bytes())
    for name, target in {"loop": cat, "deep/up": tmp_path, "a_deep": cat / "deep", "a.png": cat / "b.png"}.items():
        (cat / name).symlink_to(target)
    os.link(cat / "b.png", cat / "d.png")
    os.mkfifo(cat / "pipe.png")
    (cat / "nowhere.png").symlink_to(cat / "missing")
    named = ["b.png", "deep/c.png", "nowhere.png", "pipe.png"]
    assert [path.relative_to(cat).as_posix() for path in image_files(cat)] == named
    with pytest.warns(UserWarning, match="2 could not be read and are left out"):
        assert few_images(cat).names == ["b.png", "deep/c.png"]


# -- what commands write


@pytest.mark.parametrize("way", ["same", "dotted", "symlink", "hard link"])
def test_the_picture_that_is_restored_is_never_replaced(way, tmp_path, photo):
    out = {"same": photo, "dotted": tmp_path / "." / ".." / tmp_path.name / photo.name}.get(way, tmp_path / "b.png")
    if way.endswith("link"):
        (os.symlink if way == "symlink" else os.link)(photo, out)
    before = photo.read_bytes()
    for arguments in ((photo, out), (photo, tmp_path / "c.png", "--compare", out)):
        done = run("restore", *arguments)
        assert done.exit_code == 2
        assert "would replace" in done.output
    assert photo.read_bytes() == before


def test_a_report_replaces_reports_alone(tmp_path, photo):
    data = tmp_path / "data"
    for name in ("a", "b"):
        (data / name).mkdir(parents=True)
        (data / name / "1.png").write_bytes(photo.read_bytes())
    mine, classes = tmp_path / "mine.json", tmp_path / "classes.json"
    mine.write_text('{"name": "of somebody"}')
    classes.write_text('{"a": 0, "b": 1}')
    (tmp_path / "link.json").symlink_to(classes)
    base = ["evaluate", "test_resnet", "--no-pretrained", "--num-classes", 2, "--data", data, "--class-map", classes]
    for arguments, said in (
        (["--json", mine], "is there already, and is no report"),
        (["--json", tmp_path / "link.json"], "would replace .*classes.json, which is needed"),
        (["--plot", data / "a" / "plot.png"], "would be one of the pictures in"),
        (["--json", tmp_path / "x.png", "--plot", tmp_path / "x.png"], "would replace .*x.png"),
    ):
        done = run(*base, *arguments)
        assert done.exit_code == 2, done.output
        assert re.search(said, done.output), done.output
    assert (mine.read_text(), classes.read_text()) == ('{"name": "of somebody"}', '{"a": 0, "b": 1}')
    for _ in range(2):  # a report that is there already is replaced
        done = run(*base, "--json", tmp_path / "out.json")
        assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "out.json").read_text())["clean"]["n"] == 2
    done = run(*base, "--json", "/dev/full")  # what was measured is not lost
    assert (done.exit_code, "clean" in done.output, "the disk is full" in done.output) == (2, True, True), done.output
    (tmp_path / "w.pth").write_bytes(b"\x80\x04.")
    classes.write_text("[" * 200_000)
    for arguments, said in (([], "nested too deeply"), (["--checkpoint", tmp_path / "w.pth"], "no file of weights")):
        done = run(*base[:-2], *arguments, *(base[-2:] if not arguments else []))
        assert (done.exit_code, said in done.output) == (2, True), done.output


def test_a_dry_run_replaces_no_file_of_the_users(tmp_path):
    adapter = quac.save_adapter(timm.create_model("test_resnet_qacon"), tmp_path / "adapter")
    sent = tmp_path / "sent"
    sent.mkdir()
    (sent / "README.md").write_text("mine")
    push = ["push", adapter, "me/adapter", "--dry-run", "--out", sent]
    done = run(*push)
    assert done.exit_code == 2
    assert "README.md is there already, and is another file" in done.output
    assert [path.name for path in sent.iterdir()] == ["README.md"]
    assert (sent / "README.md").read_text() == "mine"
    for arguments in ([*push, "--overwrite"], push):  # the second time everything is there as it is
        done = run(*arguments)
        assert done.exit_code == 0, done.output
    assert sorted(path.name for path in sent.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
