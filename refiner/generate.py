"""Generate a video: load the models, then sample, decode and write chunk by chunk."""

import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .beside import Stage
from .job import Job
from .latents import LatentWriter
from .noise.refiner import Refiner, as_it_is
from .pictures import contact_sheet
from .rollout import Progress
from .sample import finite, sample
from .schedule import FPS
from .timeline import Timeline
from .video import VideoWriter, read_frames, to_frames
from .wan.causal import CausalWan
from .wan.fp8_linear import fp8_layer, with_fp8
from .wan.graphs import outside_captures
from .wan.text import load_text_encoder
from .wan.transformer import WanConfig, WanTransformer
from .wan.vae import DecoderState, WanVAE
from .wan.vae_layers import channels_last
from .wan.weight_file import open_weights

SHEET_FRAMES = 24


def read_context(path: Path, config: WanConfig) -> Tensor:
    """Read an encoded prompt from a .safetensors file, zero-padded to [1, text_len, text_dim].

    Its key is `prompt_embeds` or `context`. Raises ValueError for the output of another encoder,
    and for too many tokens.
    """
    file = open_weights(path)
    tensors = file.groups.get("flat", {})
    key = next((key for key in ("prompt_embeds", "context") if key in tensors), None)
    fits = key and tensors[key].ndim in (2, 3) and tensors[key].shape[-1] == config.text_dim
    if not fits:
        shapes = [f"{name} {list(tensor.shape)}" for name, tensor in list(tensors.items())[:3]]
        raise ValueError(
            f"{path} holds {', '.join(shapes) or 'nothing'}: a context file has `prompt_embeds` or"
            f" `context` of [1, tokens, {config.text_dim}]"
        )
    context = file.read("flat", key).float()
    if context.ndim == 3 and len(context) != 1:
        raise ValueError(f"{path} holds {len(context)} prompts: give the context of one")
    context = context.reshape(-1, config.text_dim)
    missing = config.text_len - len(context)
    if missing < 0:
        raise ValueError(
            f"{path} has {len(context)} tokens, this model takes at most {config.text_len}: shorten"
            " it"
        )
    return torch.nn.functional.pad(context, (0, 0, 0, missing))[None]


def make_context(job: Job) -> Tensor | Timeline[Tensor]:
    """Read or encode the prompt; [1, text_len, text_dim], or a timeline of such contexts."""
    if job.options.context:
        return read_context(job.options.context, job.config)
    prompts = list(dict.fromkeys(job.prompts))
    contexts = dict(zip(prompts, encode_prompts(job, prompts).split(1), strict=True))
    if job.timeline is None:
        return contexts[job.options.prompt]
    return job.timeline.timeline.map(contexts.__getitem__)


def encode_prompts(job: Job, prompts: list[str]) -> Tensor:
    """Encode prompts with the bundle's or the given text encoder, each by itself; [n, L, D]."""
    options, config = job.options, job.config
    if not options.text_encoder:
        if not options.bundle:
            raise ValueError(
                "a prompt needs --text-encoder (a umT5 folder or file), or --context with its"
                " saved output"
            )
        encode = options.bundle.text("cpu")
        return torch.cat([encode([prompt]) for prompt in prompts])
    encoder = load_text_encoder(
        options.text_encoder,
        options.tokenizer,
        device=job.device,
        text_len=config.text_len,
        cache_dir=options.context_cache,
    )
    if encoder.text_dim != config.text_dim:
        raise ValueError(
            f"{options.text_encoder} gives tokens of {encoder.text_dim}, this model takes"
            f" {config.text_dim}: use the text encoder it was trained with"
        )
    contexts = encoder.encode(prompts)
    encoder.release()
    return contexts


def load_network(job: Job) -> CausalWan:
    """Load the transformer in the job's dtype on its device; on the CPU what `ready` converts."""
    device = torch.device("cpu") if job.options.fp8 else job.device
    if job.files.model:
        model, _ = job.files.model.transformer(dtype=job.dtype, device=device)
        return CausalWan(model, job.config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = WanTransformer(job.config)
    return CausalWan(model.to(device, job.dtype).requires_grad_(False), job.config)


@contextmanager
def ready(job: Job, network: CausalWan) -> Iterator[tuple[CausalWan, Refiner | None]]:
    """Attach the job's refiner; with --fp8, convert the network and a merged copy on the device.

    A copy is merged from the unconverted weights; branches are added to the converted layers.
    """
    refiner, fp8, device = job.refiner, job.options.fp8, job.device
    if fp8 and (refiner is None or refiner.form == "unmerged"):
        network = with_fp8(network, device)
    attached = nullcontext()
    if refiner is not None:
        convert = partial(fp8_layer, device=device) if fp8 else as_it_is
        attached = refiner.attached(network, dtype=job.dtype, convert=convert)
    with attached as active:
        if fp8:
            network = with_fp8(network, device)
            active = active and replace(active, network=with_fp8(active.network, device))
        yield network, active


def load_vae(job: Job) -> WanVAE:
    """Load the decoder on the job's device, in its dtype."""
    source = job.options.vae_source
    if source is None:
        raise ValueError("latents need a decoder: give Wan2.1's VAE with --vae")
    if job.files.vae:
        vae = WanVAE.from_state_dict(job.files.vae.vae_state())
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            vae = WanVAE(source)
    vae = vae.to(job.device, job.dtype).requires_grad_(False)
    has_tensor_cores = job.device.type == "cuda" and job.dtype != torch.float32
    return channels_last(vae) if has_tensor_cores else vae


@torch.no_grad()
def generate(
    job: Job,
    callback: Callable[[Progress], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> Iterator[int]:
    """Sample, decode and write chunk by chunk; yield the number of frames in the file after each.

    A chunk is decoded and written while the next is sampled, so the numbers may come a chunk late.
    The video ends with the chunk after which `stop` returns True. After an error or an interrupt,
    NAME.partial.mp4 (and the partial latents) hold every finished chunk.
    """
    options = job.options
    vae = load_vae(job)
    if options.compile and job.device.type == "cuda":  # on a CPU it gains nothing
        compiler = job.acceleration.compiler
        vae.compile_decoder(lambda forward: outside_captures(compiler(forward)))
    counts: deque[int] = deque()  # to be yielded
    with ExitStack() as stack:
        chunks = stack.enter_context(closing(sampled(job, vae, callback)))
        next(chunks)  # the models are loaded before a file is touched
        size, extends = (options.width, options.height), job.plan.given > 0
        writer = VideoWriter(
            options.out, *size, FPS, job.metadata, extends=extends, indexed=not job.plan.endless
        )
        video = stack.enter_context(writer)
        if options.save_latents:
            chunks = saving(chunks, stack.enter_context(latents_beside(job)))
        given = [] if job.initial is None else job.initial.split(job.preset.chunk, dim=2)
        with written(job, vae, video, counts) as put:
            for x0 in chain(given, chunks):
                put(x0)
                yield from drained(counts)
                if stop is not None and stop():
                    break
        yield from drained(counts)
    options.outputs.remove_stale()
    if options.sheet:
        every = max(1, -(-options.frames // SHEET_FRAMES))
        contact_sheet(read_frames(options.out, every=every), options.sheet)


@contextmanager
def written(
    job: Job, vae: WanVAE, video: VideoWriter, counts: deque[int]
) -> Iterator[Callable[[Tensor], None]]:
    """Give a function that takes the next x0; its frames are encoded and written in a thread.

    On a GPU they are decoded in another thread, beside sampling; on a CPU, whose cores sampling
    uses, before the function returns, so one chunk (on a GPU two) is on its way to the file while
    the next is sampled. On leaving, all are in the file. Appends the number of frames in the file
    after each chunk to `counts`.
    """
    state = DecoderState()

    def write(frames: np.ndarray) -> None:
        video.write(frames)
        counts.append(video.frames)

    def decode(x0: Tensor) -> None:
        writing.put(to_frames(vae.decode(x0.to(job.device, job.dtype), state)))

    with Stage(write, "write video") as writing:
        if not job.decodes_beside:
            yield decode
            return
        with Stage(decode, "decode video", job.device) as decoding:
            yield decoding.put


def drained(counts: deque[int]) -> Iterator[int]:
    """Take what is there, from the left; another thread may append meanwhile."""
    while counts:
        yield counts.popleft()


def sampled(
    job: Job, vae: WanVAE, callback: Callable[[Progress], None] | None
) -> Iterator[Tensor | None]:
    """Load the models and yield None, then the x0 of each new chunk.

    `vae` decodes the candidates of a search. Loads nothing when all chunks are given.
    """
    if not job.plan.chunks:
        yield None
        return
    method = job.search.loaded(vae, job.device) if job.search else job.method
    context, network = make_context(job), load_network(job)
    if message := job.refiner and job.refiner.warning(network):
        warnings.warn(message, stacklevel=2)
    with (
        ready(job, network) as (network, refiner),
        job.acceleration.attached(network, refiner, job.device) as (network, refiner),
    ):
        yield None
        chunks = sample(
            network,
            context,
            job.plan,
            noise=job.noise,
            initial=job.initial,
            method=method,
            callback=callback,
            refiner=refiner,
        )
        yield from finite(chunks, len(job.plan.given_chunks))


def saving(chunks: Iterator[Tensor], latents: LatentWriter) -> Iterator[Tensor]:
    """Write each chunk to disk before passing it on, so the latents never lag behind the video."""
    for x0 in chunks:
        latents.write(x0)
        yield x0


def latents_beside(job: Job) -> LatentWriter:
    """Open the file for the job's latents beside its video."""
    shape = (job.config.in_dim, job.plan.height, job.plan.width)
    return LatentWriter(job.options.outputs.latents, shape, job.metadata, job.initial)
