"""Compare clips of the sprites sampled with products in fp8 with those sampled without.

    python benchmarks/fp8.py [--captions 32] [--seed 0]

Prints, for the base and for the merged refiner, the relative change of the latents, the total score
without fp8, and the paired difference of the exact total score with its 95 % interval over
captions.
"""

import argparse
from dataclasses import replace

import torch

from autorefiner.refiner.demo.bundle import WEIGHTS, bundled_refiner
from autorefiner.refiner.demo.clips import LATENT_FRAMES, PRESET, SIDE, decoded, held_out, score
from autorefiner.refiner.demo.evaluation import Demo
from autorefiner.refiner.demo.metrics.table import paired_difference, summarise
from autorefiner.refiner.sample import RunPlan, sample
from autorefiner.refiner.wan.fp8_linear import with_fp8


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--captions", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    demo, captions = Demo.load(WEIGHTS, torch.device("cpu")), held_out(args.captions)
    context = demo.text([caption.text for caption in captions])
    plan = RunPlan(PRESET, LATENT_FRAMES, SIDE, SIDE, len(captions))
    for form, refiner in (("base", None), ("merged refiner", bundled_refiner(demo.student))):
        fast = refiner and replace(refiner, network=with_fp8(refiner.network))
        runs = (demo.student, refiner), (with_fp8(demo.student), fast)
        latents = [
            torch.cat(list(sample(network, context, plan, seed=args.seed, refiner=active)), dim=2)
            for network, active in runs
        ]
        plain, fp8 = (score(decoded(demo.vae, clips), captions) for clips in latents)
        change = (latents[1] - latents[0]).norm() / latents[0].norm()
        gain, total = paired_difference(fp8, plain)["total"], summarise(plain)["total"]
        print(f"{form}: latents change by {change:.2f}, total {total}, fp8 less plain {gain}")


if __name__ == "__main__":
    main()
