"""Trains flux-mini with the project's own models.

    python jobs/flux-mini/train.py                    # all stages: hours on two cores, minutes on a GPU
    python jobs/flux-mini/train.py STAGE|export [--work DIR] [--pixels 64|128] [--steps N]

Every stage goes on from what it saved last (every few minutes) in ``--work``; ``kontext`` begins with the embedded
flux-mini. The results lie in ``WORK/flux-mini``, ``-dev`` and ``-kontext``, in the diffusers layout, as
``fluxbatch/checkpoints`` has them.
"""

from __future__ import annotations

import argparse
import pathlib
import shutil

import adapters
import autoencoder
import export
import flow
import guidance
import kontext
from loop import Work

STAGES = {
    "vae": (autoencoder.train_vae, 2000),
    "flow": (flow.train_flow, 4100),
    "decoder": (autoencoder.train_decoder, 600),
    "guidance": (guidance.train_guidance, 650),
    "adapters": (adapters.train_adapters, 160),
    "kontext": (kontext.train_kontext, 3000),
}


def write(work: Work) -> None:
    """The checkpoints, and the adapters; of a stage still in training, its average so far."""
    kontext.write(work)
    if work.result("flow") is None:
        return
    stats = flow.pools(work)[1]
    vae = autoencoder.VAE | {"scaling_factor": 1 / stats["std"], "shift_factor": stats["mean"]}
    folder = work.folder / "flux-mini"
    text = flow.text_configs(folder)
    export.write(folder, vae, flow.FLUX, text, work.result("vae"), work.result("flow"))
    if (params := guidance.networks(work)) is not None:
        dev = work.folder / "flux-mini-dev"
        for name in ("tokenizer", "tokenizer_2"):
            shutil.copytree(folder / name, dev / name, dirs_exist_ok=True)
        export.write(dev, vae, guidance.FLUX, text, work.result("vae"), params, guidance.SCHEDULER)
    adapters.write(work, folder / "loras")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", nargs="?", choices=[*STAGES, "export"], help="just this one")
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("outputs/flux-mini"))
    parser.add_argument("--pixels", type=int, choices=[64, 128], default=128, help="of the short side")
    parser.add_argument("--steps", type=int, help="of the one stage that is named")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    work = Work(args.work, args.pixels)
    for name, (stage, steps) in STAGES.items():
        if args.stage in (None, name):
            stage(work, (args.stage and args.steps) or steps)
    if args.stage in (None, "export"):
        write(work)


if __name__ == "__main__":
    main()
