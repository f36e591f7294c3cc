"""Train Refiner LoRA: train a refiner in ComfyUI's queue."""

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
    TrainRequest,
    begin,
    check_fit,
    check_memory,
    check_name,
    refiner_of,
    run_folder,
)

LossMap = io.Custom("LOSS_MAP")


def sockets() -> list:
    return [
        io.Model.Input(
            "model",
            tooltip="The autoregressive model to train a refiner for. It is not changed.",
        ),
        io.Clip.Input("clip", optional=True, tooltip="Encodes the prompts, and the empty prompt."),
        io.Conditioning.Input(
            "positive", optional=True,
            tooltip="Prompts that are already encoded: any number, combined or as a list. Used in"
            " addition to prompts, or instead.",
        ),
        io.Model.Input(
            "teacher", optional=True,
            tooltip="For dmd: a whole-clip model with the same latents, such as the Wan2.1 that"
            " model was distilled from.",
        ),
        io.Conditioning.Input(
            "negative", optional=True,
            tooltip="For dmd: the empty prompt, or the teacher's negative prompt.",
        ),
        RewardType.Input(
            "reward", optional=True,
            tooltip="For objective reward: the reward to raise.",
        ),
        io.Vae.Input(
            "vae", optional=True,
            tooltip="Wan2.1's VAE, for the sample sheets and for rewards.",
        ),
        ChunkScheduleType.Input(
            "chunk_schedule", optional=True,
            tooltip="Levels and chunks of your own.",
        ),
        ReflectiveCacheType.Input(
            "reflective_cache", optional=True,
            tooltip="What the refiner sees: history and previous x0.",
        ),
    ]  # fmt: skip


def widgets() -> list:
    return [
        io.String.Input(
            "run", default="my_refiner",
            tooltip="The folder in output/autorefiner with the state, the log and the sample"
            " sheets. Queue again with the same name to resume an interrupted training.",
        ),
        io.Combo.Input(
            "objective", options=list(OBJECTIVES), default="dmd",
            tooltip="dmd: match the teacher's videos (distribution matching). reward: raise a"
            " reward.",
        ),
        io.String.Input(
            "prompts", multiline=True, default="",
            tooltip="One prompt per line, encoded by clip. More prompts are better.",
        ),
        io.Int.Input(
            "steps", default=1000, min=1, max=1_000_000,
            tooltip="Total number of steps, those of earlier runs included.",
        ),
        io.Int.Input("batch_size", default=4, min=1, max=256, tooltip="Clips in a batch."),
        io.Int.Input(
            "width", default=832, min=16, max=WIDEST, step=16,
            tooltip="Pixels, a multiple of 16.",
        ),
        io.Int.Input(
            "height", default=480, min=16, max=WIDEST, step=16,
            tooltip="Pixels, a multiple of 16.",
        ),
        io.Int.Input(
            "length", default=81, min=1, max=LONGEST, step=4,
            tooltip="Pixel frames of a clip: 1 + 4n.",
        ),
        io.Int.Input(
            "rank", default=64, min=1, max=256,
            tooltip="Rank of the LoRA; the paper uses 128.",
        ),
        io.Float.Input(
            "learning_rate", default=1e-3, min=1e-7, max=1e-2, step=1e-7,
            tooltip="Warms up over the first updates, then falls to 0 along a cosine.",
        ),
        io.Int.Input(
            "seed", default=0, min=0, max=(1 << 62) - 1, control_after_generate=True,
            tooltip="Seed of the LoRA's initial weights and of all noise.",
        ),
        io.Int.Input(
            "preview_every", default=100, min=1, max=1_000_000,
            tooltip="Steps between sample sheets of the first four prompts: base above, refined"
            " below.",
        ),
        *advanced_widgets(),
    ]  # fmt: skip


def advanced_widgets() -> list:
    return [
        io.Combo.Input(
            "method", options=list(METHODS), default="autorefiner", advanced=True,
            tooltip="autorefiner: refine the noise between levels. init-noise: refine only the"
            " initial noise, for comparison.",
        ),
        io.String.Input(
            "levels", default="", advanced=True,
            tooltip="Levels whose noise is refined, like 750, 500. Empty: all but the first.",
        ),
        io.Int.Input(
            "accumulation", default=16, min=1, max=256, advanced=True,
            tooltip="Batches per step, computed one after the other. More clips make the refiner's"
            " gradient less noisy.",
        ),
        io.Float.Input(
            "l2", default=0.03, min=0.0, max=1000.0, step=0.01, advanced=True,
            tooltip="With a reward: weight of the penalty on changes of the noise.",
        ),
        io.Int.Input(
            "critic_ratio", default=2, min=1, max=100, advanced=True,
            tooltip="With dmd: critic steps for each step of the refiner.",
        ),
        io.Combo.Input(
            "precision", options=["bf16", "fp32"], default="bf16", advanced=True,
            tooltip="Precision of matrix products. A CPU without bf16 products uses fp32.",
        ),
        io.Boolean.Input(
            "checkpointing", default=False, advanced=True,
            tooltip="Recompute activations in the backward pass: less memory, a third slower.",
        ),
        io.Int.Input(
            "save_every", default=100, min=1, max=1_000_000, advanced=True,
            tooltip="Steps between saved states. An interrupted training saves its state too.",
        ),
        io.Float.Input(
            "guidance", default=GUIDANCE, min=0.0, max=100.0, step=0.1,
            optional=True, advanced=True,
            tooltip="With dmd: how strongly the teacher is guided away from the empty prompt. 0 is"
            " the teacher without guidance; 3 is what samplers call a cfg of 4.",
        ),
        io.Int.Input(
            "critic_warmup", default=WARMUP, min=0, max=1_000_000, optional=True, advanced=True,
            tooltip="With dmd: critic steps before the refiner's first update, at most a quarter of"
            " all steps.",
        ),
    ]  # fmt: skip


def text_of(value: object) -> str | None:
    """Return the text of a widget, alone or in a list; None for a link, unknown before it runs."""
    single = value[0] if isinstance(value, (list, tuple)) and value else value
    return None if single is None else str(single)


class TrainRefiner(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AutoRefinerTrainRefiner",
            display_name="Train Refiner LoRA",
            category=CATEGORY,
            description="Trains a noise refiner for a model: by distribution matching with a"
            " teacher, or by rewards. Needs no videos. Resumes where it was interrupted.",
            search_aliases=["train lora", "dmd", "reward", "distill"],
            inputs=[*sockets(), *widgets()],
            outputs=[
                RefinerType.Output(
                    tooltip="The refiner, averaged over its steps (EMA), for the samplers and Save"
                    " Refiner LoRA."
                ),
                LossMap.Output(display_name="loss_map", tooltip="For Plot Loss Graph."),
                io.Int.Output(
                    display_name="steps", tooltip="Steps taken, those of earlier runs included."
                ),
            ],
            is_input_list=True,
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, run: object = "my_refiner", prompts: object = "") -> bool | str:
        text = text_of(prompts) or ""
        if len(text) > MOST_TEXT:
            return f"prompts have {len(text)} characters: at most {MOST_TEXT} are taken"
        try:
            name = text_of(run)
            if name is not None:
                check_name(name)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(
        cls, positive: list | None = None, prompts: list | None = None, **inputs: list
    ) -> io.NodeOutput:
        from .train_run import loss_map, run_stage, stage_of

        single = {name: values[0] for name, values in inputs.items() if values}
        request = TrainRequest(
            **single, positive=tuple(positive or ()), prompts="\n".join(prompts or ())
        )
        facts = host.facts(request.model)
        options, name = request.options(facts), request.run
        request.check_sockets()
        words = [*request.lines(), *(request.reward.descriptions if request.reward else ())]
        teacher = host.facts(request.teacher) if request.objective == "dmd" else None
        if teacher is not None:
            check_fit(facts, teacher)
        check_memory(facts, teacher)
        base, folder = host.base_of(request.model), run_folder(name)
        done = begin(folder, options, base, words)
        with host.training(), stage_of(request, options) as stage:
            with host.train_watch(folder, done, request.steps) as watch:
                run_stage(stage, folder, request, watch)
            refiner = refiner_of(name, stage.average(), options, base)
        sheet = host.show_sheet(folder, f"{request.steps} steps in {name}")
        return io.NodeOutput(refiner, loss_map(folder), request.steps, ui=sheet)
