"""Compare clips of the sprites whose memory lies in another store with those of the plain one.

    python benchmarks/stores.py [--store int8] [--captions 32] [--seed 0]

Prints each store's bytes, the largest change of a latent, and the paired difference of the exact
total score with its 95 % interval over captions.
"""

import argparse

import torch

from autorefiner.refiner.demo.bundle import WEIGHTS
from autorefiner.refiner.demo.clips import LATENT_FRAMES, PRESET, SIDE, decoded, held_out, score
from autorefiner.refiner.demo.evaluation import Demo
from autorefiner.refiner.demo.metrics.table import paired_difference
from autorefiner.refiner.memory.stores import STORES
from autorefiner.refiner.sample import RunPlan, sample


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", choices=STORES, default="int8")
    parser.add_argument("--captions", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    demo, captions = Demo.load(WEIGHTS, torch.device("cpu")), held_out(args.captions)
    config, context = demo.student.config, demo.text([caption.text for caption in captions])
    latents, scores = {}, {}
    for store in ("plain", args.store):
        plan = RunPlan(PRESET, LATENT_FRAMES, SIDE, SIDE, len(captions), store=STORES[store])
        nbytes, _ = plan.memory(config, torch.float32).bytes_on(torch.device("cpu"))
        print(f"{store}: {nbytes / len(captions) / 1e6:.2f} MB a clip", flush=True)
        chunks = list(sample(demo.student, context, plan, seed=args.seed))
        latents[store] = torch.cat(chunks, dim=2)
        scores[store] = score(decoded(demo.vae, latents[store]), captions)
    change = (latents[args.store] - latents["plain"]).abs().max()
    gain = paired_difference(scores[args.store], scores["plain"])["total"]
    print(f"largest change of a latent {change:.4f}, {args.store} less plain: {gain}")


if __name__ == "__main__":
    main()
