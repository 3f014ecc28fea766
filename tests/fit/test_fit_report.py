import json
import math

import pytest

from quac_plugins.fit.confusion import Confusion
from quac_plugins.fit.report import FitReport


def stage(held, stopped=None):
    curve = [{"step": 2 * i, "loss": None if i == 0 else 1.0, "held_out": h} for i, h in enumerate(held)]
    best = min((h for h in held if math.isfinite(h)), default=math.nan)
    step = 2 * held.index(best) if best in held else 0
    return {"curve": curve, "best_step": step, "first": held[0], "best": best, "stopped": stopped}


@pytest.fixture
def report():
    return FitReport(
        what="prior",
        sites=["layer1"],
        kinds=["fog", "snow"],
        stages={
            "fog": stage([2.0, 1.0, 1.5]),
            "snow": stage([2.0, 2.5], "no better on the held-out images for 1 looks"),
        },
        gate=Confusion(
            ["identity", "fog", "snow"], {"clean": {"0": [9, 1, 0]}, "fog": {"1": [3, 1, 0], "5": [0, 4, 0]}}
        ),
        agreement={"clean": {"before": 100.0, "after": 99.0, "n": 10}, "fog": {"before": 40.0, "after": 71.6, "n": 8}},
        images={"all": 10, "held": 2},
        parameters=1234,
        multiply_adds=0.05,
        unreadable=["x/ü.jpg"],
        recipe={"steps": 4},
        seconds=12.3,
        seed=3,
    )


def test_numbers(report):
    assert report.held_out == pytest.approx((0.5 + 1.0) / 2)
    assert report.stopped == ["snow: no better on the held-out images for 1 looks"]
    assert FitReport("prior", [], []).held_out == 1.0
    assert FitReport("prior", [], [], {"fog": stage([0.0, 0.0])}).held_out == 1.0


def test_text(report):
    assert str(report).splitlines() == [
        "prior after layer1: 1234 parameters, 5.0% of the host's multiply-adds; 10 images (2 held out), 12 s",
        "  fog: held-out loss 2.000 → 1.000 at step 2",
        "  snow: held-out loss 2.000 → 2.000 at step 0 (no better on the held-out images for 1 looks)",
        "  gate, on pictures held out, of all severities:",
        "    clean: 90 % left alone, 10 % taken for fog",
        "    fog: 62 % to its expert (severity 1: 25, 5: 100), 38 % left alone",
        "  pictures held out, of all severities, that get the class of the clean picture:",
        "    clean: 100 → 99 % of 10",
        "    fog: 40 → 72 % of 8",
    ]
    report.multiply_adds, report.gate, report.sites, report.agreement = None, None, list("abcdef"), {}
    assert str(report).startswith("prior after a, b, c, d …: 1234 parameters; 10 images")
    assert "gate" not in str(report)
    assert "class of" not in str(report)


def test_files(report, tmp_path):
    path = tmp_path / "new" / "report.json"
    report.to_json(path)
    assert FitReport.from_json(path) == report
    assert [p.name for p in path.parent.iterdir()] == ["report.json"]
    earlier = {**json.loads(path.read_text()), "gate": 0.9}  # of another gate than the one that was saved
    (tmp_path / "earlier.json").write_text(json.dumps(earlier))
    assert FitReport.from_json(tmp_path / "earlier.json").gate is None
    assert json.loads(path.read_text())["unreadable"] == ["x/ü.jpg"]


def test_losses_that_are_not_finite(tmp_path):
    report = FitReport("prior", ["a"], ["fog"], {"fog": stage([math.nan, math.inf], "the loss was nan at step 1")})
    assert report.held_out == 1.0
    report.to_json(tmp_path / "report.json")

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    content = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    assert content["stages"]["fog"]["first"] is None
    for one in (report, FitReport.from_json(tmp_path / "report.json")):
        assert "(the loss was nan at step 1)" in str(one)
        assert one.held_out == 1.0
        one.plot(tmp_path / "report.png")


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_pictures(report, tmp_path, suffix, start):
    report.plot(tmp_path / f"report{suffix}")
    assert (tmp_path / f"report{suffix}").read_bytes().startswith(start)
