"""Write a network with Q-ACON as TorchScript, torch.export or ONNX, and run the file without this package.

    python examples/deploy.py --format torchscript            # or torch-export, or onnx (extra `onnx`)

The file is compared with the model before it is put in place.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
import skimage.data
import timm
import torch

import quac_plugins as quac

RUN = {
    "torchscript": "import torch; y = torch.jit.load(FILE)(torch.load(IMAGES))",
    "torch-export": "import torch; y = torch.export.load(FILE).module()(torch.load(IMAGES))",
    "onnx": "import onnxruntime, torch; s = onnxruntime.InferenceSession(FILE); "
    "y = s.run(None, {s.get_inputs()[0].name: torch.load(IMAGES).numpy()})[0]",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="test_resnet_qacon")
    parser.add_argument("--format", choices=list(RUN), default="torchscript")
    parser.add_argument("--out", type=Path, default=Path("deploy-output"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    model = timm.create_model(args.model).eval()
    pictures = np.stack([getattr(skimage.data, name)()[:160, :160] for name in ("coffee", "chelsea")])
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255
    suffix = {"torchscript": "pt", "torch-export": "pt2", "onnx": "onnx"}[args.format]
    exported = quac.export(model, args.out / f"model.{suffix}", format=args.format, example=images)
    print(exported)  # with the difference from the model, on batches of several sizes
    torch.save(images, args.out / "images.pt")
    code = (
        RUN[args.format].replace("FILE", repr(str(exported.path))).replace("IMAGES", repr(str(args.out / "images.pt")))
    )
    said = f"{code}; import sys; print(tuple(y.shape), 'without this package:', 'quac_plugins' not in sys.modules)"
    print(subprocess.run([sys.executable, "-c", said], check=True, capture_output=True, text=True).stdout.strip())


if __name__ == "__main__":
    main()
