import json
import os
import statistics
from pathlib import Path

import pytest
from PIL import Image

from quac_plugins.degradations import CORRUPTIONS
from quac_plugins.evaluate import EvaluationReport
from quac_plugins.evaluate.plot import plot_reports
from quac_plugins.evaluate.report_names import labels_of


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


def test_old_files_are_read_and_others_refused(tmp_path):
    old = Path(__file__).parents[2] / "benchmarks/results/evaluate_mobilenetv2_100.json"
    assert EvaluationReport.from_json(old).mean_corruption_top1 == pytest.approx(30.55)
    assert EvaluationReport.from_json(old).outcomes == {}
    for text, message in (
        (
            '{"model": "m", "colour": 1}',
            "'colour' is nothing that a report of an evaluation holds .known: model, clean",
        ),
        ("[]", "x.json is no report of an evaluation: a report of an evaluation is an object with model"),
        ("{", "x.json is no report of an evaluation: Expecting"),
    ):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            EvaluationReport.from_json(tmp_path / "x.json")


def with_outcomes(model, ranks, images=("a/1.jpg", "a/2.jpg", "b/3.jpg", "b/4.jpg")):
    predicted = {name: [0] * len(images) for name in ranks}
    kept = {"images": list(images), "targets": [int(i[0] == "b") for i in images], "predicted": predicted}
    return EvaluationReport(model, outcomes={**kept, "rank": ranks})


def test_a_file_has_a_line_for_each_list(tmp_path):
    made = with_outcomes("m", {"clean": [1, 1, None, -1], "fog/3": [1, 2, 3, 4]})
    made.to_json(tmp_path / "x.json")
    assert EvaluationReport.from_json(tmp_path / "x.json") == made
    assert '\n      "clean": [1, 1, null, -1],\n' in (tmp_path / "x.json").read_text()


def test_reports_are_paired_by_image():
    new = with_outcomes("new", {"clean": [1, 1, 1, 3], "fog/3": [1, 1, 1, None], "snow/3": [2, 1, 1, 1]})
    shuffled = ("b/4.jpg", "b/3.jpg", "a/1.jpg", "c/9.jpg", "a/2.jpg")
    ranks = {"clean": [1, 2, 1, 1, -1], "fog/3": [1, 2, 1, 1, 2], "snow/3": [1, 1, 1, 1, 1]}
    rows = new.paired(with_outcomes("old", ranks, shuffled))
    assert [row["condition"] for row in rows] == ["clean", "fog/3", "snow/3", "mean of corruptions"]
    assert [(row["gained"], row["lost"], row["n"]) for row in rows] == [(2, 1, 4), (2, 0, 3), (0, 1, 4), (2, 1, 3)]
    assert rows[0]["difference"] == 25.0
    half = 1.96 * 100 * statistics.stdev([0, 1, 1, -1]) / 2
    assert (rows[0]["low"], rows[0]["high"]) == pytest.approx((25 - half, 25 + half))
    assert rows[3]["difference"] == pytest.approx(100 / 6)
    with pytest.raises(ValueError, match="bare holds no outcomes"):
        new.paired(EvaluationReport("bare"))
    with pytest.raises(ValueError, match="share no images"):
        new.paired(with_outcomes("old", {"clean": [1]}, ("a/5.jpg",)))
    other = with_outcomes("old", {"clean": [1, 1, 1, 1]})
    other.outcomes["targets"][1] = 5
    with pytest.raises(ValueError, match=r"'a/2.jpg' for different classes"):
        new.paired(other)


def described(adapter=None, mean=0.5, torch="2.14.1", weights="abcdef0123"):
    inside = {"sha256": "a1b2c3d4", "activations": None, "prior": {}} if adapter else None
    base = {"path": "data/tf2.safetensors", "sha256": "fedcba98"}
    given = {"base_checkpoint": base, "adapter": {"name": adapter} if adapter else None, "model_kwargs": {"k": 1}}
    made = report()
    made.network, made.versions = {"weights": weights, "inside": inside, "given": given}, {"torch": torch}
    made.preprocessing = {"input_size": [3, 96, 64], "mean": [mean] * 3, "crop_pct": 0.875}
    return made


def test_titles_and_legends_tell_reports_apart(tmp_path, monkeypatch):
    one = described("runs/fog-adapter")
    assert one.label == "resnet18 + fog-adapter (a1b2c3)"
    title = str(one.table().title)
    for text in (
        one.label,
        "tf2.safetensors (fedcba)",
        "k=1",
        "96×64",
        "crop 0.875",
        "mean 0.5",
        "torch 2.14.1",
        "seed 4",
    ):
        assert text in title
    same = described()
    reports = [one, same, described(mean=0.25), described(torch="2.15.0"), described(weights="other12"), same, report()]
    labels = labels_of(reports)
    assert len(set(labels)) == len(reports)
    assert labels[0] == "resnet18 + fog-adapter (a1b2c3), mean 0.5, torch 2.14.1"
    assert labels[2] == "resnet18, mean 0.25, torch 2.14.1"
    assert labels[4] == "resnet18, mean 0.5, torch 2.14.1, weights other1"
    assert labels[6] == "resnet18"
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.legend", lambda self, handles, texts, **_: drawn.extend(texts))
    plot_reports(reports, tmp_path / "x.png")
    assert [" ".join(text.split()) for text in drawn] == labels


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
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: figures.append(self) or save(self, *args, **kw))
    fewer = report("b", severities=("3",), clean=70.0)
    fewer.corruptions.pop("fog")
    plot_reports([report("a"), fewer], tmp_path / "x.png")
    (figure,) = figures
    (axes,) = figure.axes
    groups = [label.get_text().replace("\n", " ") for label in axes.get_xticklabels()]
    first, second = (
        {groups[round(bar.get_x() + bar.get_width() / 2)]: bar.get_height() for bar in bars} for bars in axes.containers
    )
    assert figure.get_suptitle() == "severity 1, 3, 5"
    assert [bars.get_label() for bars in axes.containers] == ["a", "b"]
    assert first["gaussian noise"] == 40.0
    assert not any("mean" in group for group in groups)
    assert first["fog"] > second["fog"] == 0
    assert (tmp_path / "x.png").is_file()
