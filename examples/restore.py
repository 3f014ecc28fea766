"""Restore a degraded photograph with the pipeline of the package, and say how near it is to the clean one.

    python examples/restore.py --degradation rain --severity 3

Writes OUT/restored.png: clean, degraded, restored. A photograph of yours: `quac restore photo.jpg restored.png`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import skimage.data
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio

from quac_plugins.diffusers import QuACRestorationPipeline
from quac_plugins.impairments import IMPAIRMENTS, impair


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--degradation", choices=list(IMPAIRMENTS), default="rain")
    parser.add_argument("--severity", type=int, choices=range(1, 6), default=3)
    parser.add_argument("--side", type=int, default=192)
    parser.add_argument("--out", type=Path, default=Path("restore-output"))
    args = parser.parse_args()
    clean = skimage.data.astronaut()[: args.side, 128 : 128 + args.side]
    degraded = impair(clean, args.degradation, args.severity, seed=0)
    pipe = QuACRestorationPipeline.from_pretrained("restoration_qacon.bsds")
    pipe.set_progress_bar_config(disable=True)
    restored = np.asarray(pipe(degraded).images[0])
    before, after = (peak_signal_noise_ratio(clean, picture) for picture in (degraded, restored))
    print(f"{args.degradation}, severity {args.severity}: {before:.1f} dB degraded, {after:.1f} dB restored")
    args.out.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.hstack([clean, degraded, restored])).save(args.out / "restored.png")


if __name__ == "__main__":
    main()
