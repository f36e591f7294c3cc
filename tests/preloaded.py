"""Slow imports of a training process, done once by the server that forks them."""

# ruff: noqa: F401
import peft
import torch._dynamo
import torch._refs
import torch.distributed.checkpoint
import torch.distributed.fsdp

from autorefiner.refiner.demo.metrics.classify import templates

import tiny_bundle

templates()
