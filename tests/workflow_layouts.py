"""What the page shows of each workflow beside its nodes: a note, and which group a node is in."""

from dataclasses import dataclass

Columns = tuple[tuple[int, ...], ...]  # ids of nodes, from left to right, each from top to bottom
COLOURS = {"load": "#3f789e", "prompt": "#8A8", "sample": "#a1309b", "watch": "#b58b2a"}

# Samplers that share a model and a prompt, both left of them, are no planar graph.
CROSSINGS = {"quickstart": 2, "compare_controls": 5, "train_a_refiner": 2}


@dataclass(frozen=True, slots=True)
class Layout:
    """A note of three sentences, the document that says more, and the nodes of each group."""

    note: str
    help: str  # a document of the repository
    load: Columns
    prompt: Columns
    sample: Columns
    watch: Columns
    stacked: bool = False  # with Prompt below Load, where a row of four groups is too wide

    @property
    def groups(self) -> dict[str, Columns]:
        """Return the columns of each group by its name."""
        return {name: getattr(self, name) for name in COLOURS}


LAYOUTS = {
    "quickstart": Layout(
        "Samples one prompt twice from the same noise: by the demo's model alone, and with its"
        " noise refiner. Run it as it is, without a download; the prompt is the first held-out one"
        " whose clip by the model alone scores below 80. Compare Videos shows both clips under a"
        " slider, and Save Video writes them side by side.",
        "docs/refiners.md",
        load=((1, 3),), prompt=((2,),), sample=((4,), (5,)), watch=((6, 7, 9, 10), (8, 11)),
    ),
    "text_to_video": Layout(
        "Samples a video of the demo's model, chunk by chunk, and shows each chunk as soon as it is"
        " finished. The model knows coloured shapes and how they move, in the words of the demo's"
        " captions. For a longer video raise length, which is 1 + 4n frames.",
        "docs/demo.md",
        load=((1,),), prompt=((2,),), sample=((3,),), watch=((4, 5), (6,)),
    ),
    "self_forcing": Layout(
        "Samples a video of a published model, Self-Forcing. The page offers the three files that"
        " are missing. Reflective Cache leaves the memory as the model was trained; give it a"
        " window for longer videos.",
        "docs/models.md",
        load=((1, 2, 3),), prompt=((4,),), sample=((5,), (6,)), watch=((7,),),
    ),
    "self_forcing_refiner": Layout(
        "Samples a published model, Self-Forcing, with a noise refiner of yours. Train one as in"
        " train_a_refiner, or choose any .refiner.safetensors in models/loras. A strength of 0 is"
        " the model without it, bit for bit.",
        "docs/refiners.md",
        load=((1, 2, 3), (5,)), prompt=((4,),), sample=((6,), (7,)), watch=((8,),),
    ),
    "start_image": Layout(
        "Samples a video that goes on from a picture. The picture is scaled to the size of the"
        " video and encoded; it becomes the first frame. The page offers the three model files"
        " that are missing.",
        "docs/models.md",
        load=((1, 2, 3),), prompt=((4, 5), (6,), (7,)), sample=((8,),), watch=((9,),),
    ),
    "extend_a_clip": Layout(
        "Samples a clip, then goes on from it with another prompt. The second sampler takes the"
        " first one's latents as start and samples only what is missing. A window of 21 latent"
        " frames keeps the memory the same at any length.",
        "docs/timeline.md",
        load=((1,),), prompt=((2, 5),), sample=((3,), (4,), (6,)), watch=((7,),),
    ),
    "prompt_timeline": Layout(
        "Samples one video of three scenes, each with a prompt of its own. A line of Prompt"
        " Timeline says when a scene starts, how it follows the one before, and what it shows. The"
        " sampler names the chunks that each scene got.",
        "docs/timeline.md",
        load=((1,),), prompt=((2,),), sample=((7,), (3,)), watch=((4, 5), (6,)),
    ),
    "long_video": Layout(
        "Samples 321 frames, four times as many as the demo's model was trained for. Reflective"
        " Cache reads the past by deep-sink: a long sink, the last frames, and between them what"
        " answers a chunk best. Memory stays the same at any length, so length may be much larger.",
        "docs/memory.md",
        load=((1,),), prompt=((2,),), sample=((3,), (4,)), watch=((5,),),
    ),
    "reroll_a_chunk": Layout(
        "Samples a video whose third chunk, and all after it, were drawn again. The choice stands"
        " in the sampler's recipe as reroll 3, where the buttons on its strip write it; the first"
        " two chunks are those of the empty recipe. Add keep 4 or extend 2, with ; between, to end"
        " the clip or to go on.",
        "web/docs/AutoRefinerSampler.md",
        load=((1,),), prompt=((2,),), sample=((3,),), watch=((4,),),
    ),
    "video_to_video": Layout(
        "Samples a clip of a red star, then makes it a yellow one. The second sampler starts each"
        " chunk from those frames under the noise of start_level 500, so that motion stays and the"
        " new prompt shows. Any video of the same length will do in place of the first sampler.",
        "web/docs/AutoRefinerSampler.md",
        load=((1,),), prompt=((2, 3),), sample=((4,), (5,), (6,)), watch=((7,),),
    ),
    "best_of_n": Layout(
        "Samples each chunk three times and keeps the one that a reward likes best. The reward is"
        " the demo's, and reads the prompt as text. More candidates take as many times as long.",
        "docs/refiners.md",
        load=((1, 2),), prompt=((3,),), sample=((4,), (5,)), watch=((6,),),
    ),
    "longlive": Layout(
        "Samples 321 frames of LongLive 1, whose preset holds a window of 12 latent frames with a"
        " sink of 3. longlive_base.pt is the model before its LoRA, lora.pt, whose names ComfyUI's"
        " LoRA loaders do not read; autorefiner generate --lora does. The page offers the files"
        " that are missing.",
        "docs/models.md",
        load=((1, 2, 3),), prompt=((4,),), sample=((5,),), watch=((6,),),
    ),
    "krea_14b": Layout(
        "Samples a video of Krea's realtime model with 14 billion weights. Its preset holds a"
        " window of 6 latent frames with a sink of 1; Krea's server recomputes this context before"
        " every chunk, here it stays. The page offers the files that are missing.",
        "docs/models.md",
        load=((1, 2, 3),), prompt=((4,),), sample=((5,),), watch=((6,),),
    ),
    "compare_controls": Layout(
        "Samples one prompt in three ways from the same noise: the base, with a refiner, and by"
        " P&P's self-refinement. Save Video shows all three side by side. Compare Videos puts the"
        " first two under a slider.",
        "docs/refiners.md",
        load=((1, 3),), prompt=((2,),), sample=((4,), (5,), (6,)),
        watch=((8, 9, 10, 12, 14, 15), (17, 16)), stacked=True,
    ),
    "train_a_refiner": Layout(
        "Trains a small refiner in the queue, saves it, and samples with it. The trainer draws its"
        " curves and a sheet of samples while it runs. It needs peft, and goes on where it was"
        " stopped.",
        "docs/training.md",
        load=((1, 2),), prompt=((5,),), sample=((3,), (6, 4), (7,)),
        watch=((8, 9, 11, 12), (10, 13)), stacked=True,
    ),
    "sampler_custom_advanced": Layout(
        "Samples the demo's model through ComfyUI's own SamplerCustomAdvanced. Noise, levels and"
        " guider come from core nodes; only the SAMPLER is of this pack. Use it where a workflow"
        " brings its own SIGMAS or GUIDER.",
        "docs/comfyui.md",
        load=((1, 3),), prompt=((2,),), sample=((6, 5), (8, 4, 7), (9,)),
        watch=((10, 11, 12),),
    ),
}  # fmt: skip
