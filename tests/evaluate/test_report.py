import json
import os

import pytest
from PIL import Image

from quac_plugins.degradations import CORRUPTIONS
from quac_plugins.evaluate import EvaluationReport
from quac_plugins.evaluate.plot import plot_reports


def scores(top1, n=200):
    return {"top1": top1, "top5": None if top1 is None else min(100.0, top1 + 20), "n": n}


def report(model="resnet18", severities=("1", "3", "5"), clean=76.0):
    corruptions = {
        name: {s: scores(70.0 - 2 * i - 10.0 * int(s)) for s in severities} for i, name in enumerate(CORRUPTIONS[:10])
    }
    return EvaluationReport(
        model, scores(clean), corruptions, severities=[int(s) for s in severities], unreadable=["a b/é.jpg"], seed=4
    )


def test_dict_has_results_and_settings():
    content = report().to_dict()
    assert list(content)[:4] == ["model", "clean", "corruptions", "mean_corruption_top1"]
    assert content["corruptions"]["gaussian_noise"]["3"] == {"top1": 40.0, "top5": 60.0, "n": 200}
    assert content["mean_corruption_top1"] == pytest.approx(31.0)
    for key in ("unreadable", "seed", "severities", "data", "preprocessing", "versions", "seconds"):
        assert key in content


def test_json_round_trip_replaces_whole_files(tmp_path):
    path = tmp_path / "deep" / "out.json"
    report("old").to_json(path)
    report("ñew").to_json(path)
    assert EvaluationReport.from_json(path) == report("ñew")
    assert os.listdir(path.parent) == ["out.json"]
    assert json.loads(path.read_text(encoding="utf-8"))["unreadable"] == ["a b/é.jpg"]


def test_json_never_holds_a_nan(tmp_path):
    empty = EvaluationReport("m", scores(None, 0), {"fog": {"3": scores(None, 0)}})
    assert empty.mean_corruption_top1 is None
    empty.to_json(tmp_path / "out.json")
    assert "NaN" not in (tmp_path / "out.json").read_text()
    empty.clean = scores(float("nan"))
    with pytest.raises(ValueError, match="JSON"):
        empty.to_json(tmp_path / "out.json")
    assert os.listdir(tmp_path) == ["out.json"]


def test_table_shows_every_row():
    from rich.console import Console

    console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(report().table())
    text = console.export_text()
    assert all(name in text for name in CORRUPTIONS[:10])
    assert "76.00" in text
    assert "31.00" in text
    assert len(report().rows()) == 31


@pytest.mark.parametrize("name", ["x.png", "x.svg", "x.pdf"])
def test_plot_writes_the_kind_that_the_suffix_says(tmp_path, name):
    report().plot(tmp_path / name)
    start = (tmp_path / name).read_bytes()[:300]
    assert {"png": b"\x89PNG", "svg": b"<svg", "pdf": b"%PDF"}[name[2:]] in start or b"<?xml" in start


def test_plot_leaves_pyplot_alone_and_covers_the_page(tmp_path):
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    report().plot(tmp_path / "x.png")
    assert plt.get_fignums() == before
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.width > 1000
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 10


def test_plot_of_clean_alone_and_of_nothing(tmp_path):
    EvaluationReport("m", scores(50.0)).plot(tmp_path / "x.png")
    with pytest.raises(ValueError, match="nothing to draw"):
        EvaluationReport("m").plot(tmp_path / "y.png")
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_reports([], tmp_path / "y.png")
    assert os.listdir(tmp_path) == ["x.png"]


def test_several_reports_are_compared_at_the_severities_they_share(tmp_path, monkeypatch):
    from quac_plugins.evaluate import plot

    drawn = []
    original = plot._draw
    monkeypatch.setattr(plot, "_draw", lambda *args: (drawn.append(args), original(*args)))
    fewer = report("b", severities=("3",), clean=70.0)
    fewer.corruptions.pop("fog")
    plot_reports([report("a"), fewer], tmp_path / "x.png")
    groups, bars, _, title, _ = drawn[0]
    assert (title, bars[0][0], bars[1][0]) == ("severity 1, 3, 5", "a", "b")
    values = dict(zip(groups, bars[0][2], strict=False))
    assert values["gaussian_noise"] == 40.0
    assert "mean of corruptions" not in groups
    assert dict(zip(groups, bars[1][2], strict=False))["fog"] is None
    assert (tmp_path / "x.png").is_file()
