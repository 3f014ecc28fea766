"""Share an adapter on the Hub, privately, and load it offline.

    python examples/share.py                                  # a dry run: everything that would be sent, in a folder
    python examples/share.py --repo my-org/my-adapter         # sends it to a private repository, and pulls it

Token, cache and mirror are those of huggingface_hub: `hf auth login` or HF_TOKEN, HF_HOME, HF_ENDPOINT.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import skimage.data
import timm
import torch

import quac_plugins as quac


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repo", help="ORG/NAME on the Hub")
    parser.add_argument("--out", type=Path, default=Path("share-output"))
    args = parser.parse_args()
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10).eval()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    quac.inject(model, quac.QuACConfig(quality="brisque_tone"))
    for parameter in (p for name, p in model.named_parameters() if name.endswith(".p1")):
        torch.nn.init.normal_(parameter, 1.0, 0.1)  # in place of a training

    settings = {"license": "apache-2.0"} | ({"private": True} if args.repo else {"dry_run": args.out / "sent"})
    print(quac.push(model, args.repo or "my-org/my-adapter", **settings))
    folder = quac.pull(args.repo, args.out / "pulled") if args.repo else args.out / "sent"

    host = timm.create_model("test_resnet", num_classes=10).eval()
    host.load_state_dict(weights)  # an adapter is for a host with these weights, and warns of others
    loaded = quac.load_adapter(host, folder)  # from a folder: no network
    picture = torch.from_numpy(np.array(skimage.data.coffee()[:160, :160])).permute(2, 0, 1)[None] / 255
    print("the same answers:", torch.equal(loaded(picture), model(picture)))


if __name__ == "__main__":
    main()
