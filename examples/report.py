"""Say what an adapter does: of one picture, of labelled pictures, and beside the network without it.

    python examples/report.py                                   # scikit-image's photographs, and the published adapter
    python examples/report.py --picture street.jpg --labelled DIR --model NAME_ddp.TAG

Writes OUT/host.json and OUT/adapter.json, every outcome in them, and OUT/both.png, which draws the two side by side.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import skimage.data
import timm
from PIL import Image

import quac_plugins as quac
from quac_plugins.degradations import corrupt
from quac_plugins.evaluate import EvaluationReport, evaluate
from quac_plugins.evaluate.plot import plot_reports
from quac_plugins.evaluate.predict import predict

LABELLED = {"coffee": "n07920052", "chelsea": "n02124075"}  # espresso, Egyptian cat


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tf_efficientnet_lite0_ddp.in1k_weather")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--labelled", type=Path)
    parser.add_argument("--corruption", default="contrast")
    parser.add_argument("--severity", type=int, default=4)
    parser.add_argument("--crops", type=int, default=6, help="of each labelled photograph of scikit-image")
    parser.add_argument("--out", type=Path, default=Path("report-output"))
    args = parser.parse_args()
    labelled = args.labelled or args.out / "labelled"
    for name, synset in {} if args.labelled else LABELLED.items():
        picture = Image.fromarray(getattr(skimage.data, name)())
        (labelled / synset).mkdir(parents=True, exist_ok=True)
        for i in range(args.crops):
            picture.crop((12 * i, 4 * i, 12 * i + 260, 4 * i + 260)).save(labelled / synset / f"{name}-{i}.png")

    model = timm.create_model(args.model, pretrained=True).eval()
    print(quac.injection_of(model))  # what is inside, where, what it reads, and how much it is
    picture = Image.open(args.picture) if args.picture else Image.fromarray(skimage.data.coffee())
    picture = Image.fromarray(corrupt(picture.convert("RGB"), args.corruption, args.severity, seed=0))
    told = predict(model, picture)
    print("host:", ", ".join(f"{name} {chance:.0f} %" for name, chance in told.host[:3]))
    print("with the adapter:", ", ".join(f"{name} {chance:.0f} %" for name, chance in told.classes[:3]))
    print("what it sees:", ", ".join(f"{name} {value:.1f}" for name, value in told.quality.items()))

    reports: list[EvaluationReport] = []
    for name in ("adapter", "host"):
        network = model if name == "adapter" else quac.remove(model)
        options = {"corruptions": args.corruption, "severities": args.severity, "progress": False}
        reports.append(evaluate(network, labelled, **options))
        reports[-1].to_json(args.out / f"{name}.json")
    for row in reports[0].paired(reports[1]):
        print("{condition}: {difference:+.1f} points of top-1, 95 % within {low:+.1f} and {high:+.1f}".format(**row))
    plot_reports(reports[::-1], args.out / "both.png")


if __name__ == "__main__":
    main()
