"""Train Refiner LoRA: a refiner of one's own, in the queue and with nobody watching."""

from .api import CATEGORY, host, io
from .cache import ReflectiveCacheType
from .chunk_schedule import ChunkScheduleType
from .refiner import RefinerType
from .rewards import RewardType
from .train_plan import (
    GUIDANCE,
    LONGEST,
    METHODS,
    MOST_TEXT,
    OBJECTIVES,
    WARMUP,
    WIDEST,
    Asked,
    begin,
    check_fit,
    check_memory,
    check_name,
    refiner_of,
    run_folder,
)

LossMap = io.Custom("LOSS_MAP")


def sockets() -> list:
    """What it is connected to."""
    return [
        io.Model.Input("model", tooltip="The autoregressive model that the refiner is for. It stays as it is."),
        io.Clip.Input("clip", optional=True, tooltip="Encodes the prompts, and no prompt."),
        io.Conditioning.Input(
            "positive", optional=True,
            tooltip="Prompts that are encoded already: any number, combined or as a list. With or instead of prompts.",
        ),
        io.Model.Input(
            "teacher", optional=True,
            tooltip="For dmd: a model of whole clips with the same latents, such as the Wan2.1 that model came from.",
        ),
        io.Conditioning.Input("negative", optional=True, tooltip="For dmd: no prompt, or the teacher's negative one."),
        RewardType.Input("reward", optional=True, tooltip="For objective reward: what to raise."),
        io.Vae.Input("vae", optional=True, tooltip="Wan2.1's VAE, for the sample sheets and for rewards."),
        ChunkScheduleType.Input("chunk_schedule", optional=True, tooltip="Levels and chunks of your own."),
        ReflectiveCacheType.Input(
            "reflective_cache", optional=True, tooltip="What the refiner sees: history and previous x0.",
        ),
    ]  # fmt: skip


def widgets() -> list:
    """What it is told."""
    return [
        io.String.Input(
            "run", default="my_refiner",
            tooltip="The folder in output/autorefiner with the state, the log and the sample sheets. Queued again under"
            " the same name, a training goes on where it was interrupted.",
        ),
        io.Combo.Input(
            "objective", options=list(OBJECTIVES), default="dmd",
            tooltip="dmd: look like the teacher's videos (distribution matching). reward: raise a reward.",
        ),
        io.String.Input(
            "prompts", multiline=True, default="", tooltip="A prompt a line, which clip encodes. More are better.",
        ),
        io.Int.Input("steps", default=1000, min=1, max=1_000_000, tooltip="Steps in all, those of earlier runs too."),
        io.Int.Input("batch_size", default=4, min=1, max=256, tooltip="Clips at once."),
        io.Int.Input("width", default=832, min=16, max=WIDEST, step=16, tooltip="Pixels, a multiple of 16."),
        io.Int.Input("height", default=480, min=16, max=WIDEST, step=16, tooltip="Pixels, a multiple of 16."),
        io.Int.Input("length", default=81, min=1, max=LONGEST, step=4, tooltip="Pixel frames of a clip: 1 + 4n."),
        io.Int.Input("rank", default=64, min=1, max=256, tooltip="Of the LoRA; the paper's is 128."),
        io.Float.Input(
            "learning_rate", default=1e-3, min=1e-7, max=1e-2, step=1e-7,
            tooltip="Rises over the first updates and falls to 0 along a cosine.",
        ),
        io.Int.Input(
            "seed", default=0, min=0, max=(1 << 62) - 1, control_after_generate=True,
            tooltip="Of the LoRA's start and of all noise.",
        ),
        io.Int.Input(
            "preview_every", default=100, min=1, max=1_000_000,
            tooltip="Steps between two sample sheets: base above, refined below, of the first four prompts.",
        ),
        *advanced_widgets(),
    ]  # fmt: skip


def advanced_widgets() -> list:
    """What is good as it is."""
    return [
        io.Combo.Input(
            "method", options=list(METHODS), default="autorefiner", advanced=True,
            tooltip="autorefiner: refine the noise between levels. init-noise: only the first noise, for comparison.",
        ),
        io.String.Input(
            "levels", default="", advanced=True,
            tooltip="Levels whose noise is refined, like 750, 500. Empty: all but the first.",
        ),
        io.Int.Input(
            "accumulation", default=16, min=1, max=256, advanced=True,
            tooltip="Batches a step, one after the other. More clips make the refiner's gradient less noisy.",
        ),
        io.Float.Input(
            "l2", default=0.03, min=0.0, max=1000.0, step=0.01, advanced=True,
            tooltip="With a reward: how much a change of the noise costs.",
        ),
        io.Int.Input(
            "critic_ratio", default=2, min=1, max=100, advanced=True,
            tooltip="With dmd: steps of the critic for one of the refiner.",
        ),
        io.Combo.Input(
            "precision", options=["bf16", "fp32"], default="bf16", advanced=True,
            tooltip="Of products; fp32 on a CPU that has none in bf16.",
        ),
        io.Boolean.Input(
            "checkpointing", default=False, advanced=True,
            tooltip="Compute activations again instead of keeping them: less memory, a third slower.",
        ),
        io.Int.Input(
            "save_every", default=100, min=1, max=1_000_000, advanced=True,
            tooltip="Steps between two saved states. An interrupted training saves its own.",
        ),
        io.Float.Input(
            "guidance", default=GUIDANCE, min=0.0, max=100.0, step=0.1, optional=True, advanced=True,
            tooltip="With dmd: how far the teacher is pushed from no prompt to the prompt. 0 is the teacher as it is;"
            " 3 is what samplers call a cfg of 4.",
        ),
        io.Int.Input(
            "critic_warmup", default=WARMUP, min=0, max=1_000_000, optional=True, advanced=True,
            tooltip="With dmd: steps of the critic before the refiner's first update, at most a quarter of all.",
        ),
    ]  # fmt: skip


def first(value: object) -> str | None:
    """The text of an input that comes in a list, or alone; None of a link, which is not known before it runs."""
    one = value[0] if isinstance(value, (list, tuple)) and value else value
    return None if one is None else str(one)


class TrainRefiner(io.ComfyNode):
    """A REFINER, its losses, and how many steps it took."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AutoRefinerTrainRefiner",
            display_name="Train Refiner LoRA",
            category=CATEGORY,
            description="Trains a noise refiner for a model: by distribution matching with a teacher, or by rewards."
            " Needs no videos. Goes on where it was interrupted.",
            search_aliases=["train lora", "dmd", "reward", "distill"],
            inputs=[*sockets(), *widgets()],
            outputs=[
                RefinerType.Output(tooltip="The averaged refiner, for the samplers and Save Refiner LoRA."),
                LossMap.Output(display_name="loss_map", tooltip="For Plot Loss Graph."),
                io.Int.Output(display_name="steps", tooltip="Steps taken in all."),
            ],
            is_input_list=True,
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, run: object = "my_refiner", prompts: object = "") -> bool | str:
        if len(text := first(prompts) or "") > MOST_TEXT:
            return f"prompts have {len(text)} characters: at most {MOST_TEXT} are taken"
        try:
            if (name := first(run)) is not None:
                check_name(name)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, positive: list | None = None, prompts: list | None = None, **inputs: list) -> io.NodeOutput:
        from .train_run import loss_map, run_stage, stage_of

        single = {name: values[0] for name, values in inputs.items() if values}
        asked = Asked(**single, positive=tuple(positive or ()), prompts="\n".join(prompts or ()))
        facts = host.facts(asked.model)
        options, name = asked.options(facts), asked.run
        asked.check_sockets()
        words = [*asked.lines(), *(asked.reward.told if asked.reward else ())]
        teacher = host.facts(asked.teacher) if asked.objective == "dmd" else None
        if teacher is not None:
            check_fit(facts, teacher)
        check_memory(facts, teacher)
        base, folder = host.base_of(asked.model), run_folder(name)
        done = begin(folder, options, base, words)
        with host.training(), stage_of(asked, options) as stage:
            with host.train_watch(folder, done, asked.steps) as watch:
                run_stage(stage, folder, asked, watch)
            refiner = refiner_of(name, stage.average(), options, base)
        shown = host.show_sheet(folder, f"{asked.steps} steps in {name}")
        return io.NodeOutput(refiner, loss_map(folder), asked.steps, ui=shown)
