"""Synthetic files under published and other names, with their expected layout, model and stage."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from published import (
    FSDP,
    State,
    diffusers_name,
    in_diffusers,
    make_state,
    prefixed,
    write,
    write_14b,
)

from autorefiner.refiner.wan.transformer import WanConfig

SMALL = WanConfig(dim=128, num_heads=1, ffn_dim=64, num_layers=1, text_dim=8)
# A second network in the file that must not be loaded.
OTHER = {"model.blocks.0.self_attn.q.weight": torch.zeros(2, 2)}
Make = Callable[[Path, State], Path]


@dataclass(frozen=True, slots=True)
class Case:
    """A file written by `make` at `name`; without a preset, `likely` is the first suggestion."""

    name: str
    make: Make
    preset: str | None = None
    likely: str | None = None
    kind: str = "transformer"
    opens: bool = True
    large: bool = False  # a 14B file without data
    exact: bool = True  # whether its weights are the state's, bit for bit


def single(content: Callable[[State], object], metadata: dict | None = None) -> Make:
    """Return a writer of one file with `content(state)`."""
    texts = {key: json.dumps(value) for key, value in (metadata or {}).items()}

    def make(path: Path, state: State) -> Path:
        return write(path, content(state), texts or None)

    return make


def folder(*parts: str, files: dict[str, dict] | None = None) -> Make:
    """Return a writer of a diffusers folder: `parts` are its networks, `files` its JSON files."""

    def make(path: Path, state: State) -> Path:
        for part in parts:
            write(path / part / "diffusion_pytorch_model.safetensors", in_diffusers(state))
        for name, content in (files or {}).items():
            (path / name).write_text(json.dumps(content))
        return path

    return make


def shards(one: bool, stem: str = "model") -> Make:
    """Return a writer of two shards without an index, opened by the first shard or the folder."""

    def make(path: Path, state: State) -> Path:
        half = len(state) // 2
        for number, names in enumerate((list(state)[:half], list(state)[half:]), 1):
            write(
                path / f"{stem}-{number:05}-of-00002.safetensors",
                {name: state[name] for name in names},
            )
        return path / f"{stem}-00001-of-00002.safetensors" if one else path

    return make


def large(prefix: str) -> Make:
    return lambda path, _: write_14b(path, prefix)


def large_expert(path: Path, _: State) -> Path:
    """Write a pipeline of two 14B networks and open its first."""
    write_14b(path / "transformer_2" / "diffusion_pytorch_model.safetensors", rename=diffusers_name)
    write_14b(path / "transformer" / "diffusion_pytorch_model.safetensors", rename=diffusers_name)
    (path / "model_index.json").write_text(
        json.dumps({"transformer_2": ["diffusers", "CausalWan"]})
    )
    return path / "transformer"


def large_causal(path: Path, _: State) -> Path:
    """Write a 14B network in a folder whose config.json names a causal class."""
    write_14b(path / "diffusion_pytorch_model.safetensors", rename=diffusers_name)
    (path / "config.json").write_text(json.dumps(CAUSAL_CLASS))
    return path


def alone(path: Path, state: State) -> Path:
    """Write the first network of a two-network pipeline without the second."""
    index = {"transformer_2": ["diffusers", "CausalWanTransformer3DModel"], "boundary_ratio": 0.875}
    return folder("transformer", files={"model_index.json": index})(path, state)


def wrapped(state: State) -> State:
    return prefixed(state, "model.")


def generator(state: State) -> dict:
    return {"generator": wrapped(state), "critic": OTHER}


def averaged(state: State) -> dict:
    return {"generator": OTHER, "generator_ema": wrapped(state), "critic": OTHER}


def sharded_ema(state: State) -> dict:
    """Name the averaged weights as trainers under FSDP do."""
    return {"generator_ema": prefixed(state, FSDP), "generator": OTHER}


def raw_beside_ema(state: State) -> dict:
    return {"generator": wrapped(state), "generator_ema": prefixed(OTHER, "")}


def peft_wrapped(state: State) -> State:
    """Wrap each linear layer of the block with a zero LoRA, as peft names it."""
    stored = {}
    for name, tensor in state.items():
        layer, _, part = name.rpartition(".")
        linear = (
            name.startswith("blocks.")
            and layer + ".weight" in state
            and state[layer + ".weight"].ndim == 2
        )
        stored[f"base_model.model.{layer}{'.base_layer' * linear}.{part}"] = tensor
        if linear and part == "weight":
            stored[f"base_model.model.{layer}.lora_A.default.weight"] = torch.ones(
                2, tensor.shape[1]
            )
            stored[f"base_model.model.{layer}.lora_B.default.weight"] = torch.zeros(
                tensor.shape[0], 2
            )
    return stored


def pipeline(state: State) -> State:
    rest = {
        "text_encoder.a": torch.zeros(1),
        "vae.b": torch.zeros(1),
        "real_score.model.c": torch.zeros(1),
    }
    return prefixed(state, "generator.model.") | rest


def fp8(scale_name: str, by_row: bool) -> Callable[[State], State]:
    """Quantise the block's layers to fp8 with scales."""

    def content(state: State) -> State:
        stored = dict(state)
        for name, tensor in state.items():
            if tensor.ndim == 2 and name.startswith("blocks."):
                scale = torch.full((len(tensor),), 0.5) if by_row else torch.tensor(0.5)
                stored[name] = (tensor.float() / 0.5).to(torch.float8_e4m3fn)
                stored[name.removesuffix("weight") + scale_name] = scale
        mark = {} if by_row else {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
        return prefixed(stored | mark, "" if by_row else "model.")

    return content


def lora(down: str, up: str) -> Callable[[State], State]:
    return lambda _: {down: torch.zeros(2, 128), up: torch.zeros(128, 2)}


def average_only(state: State) -> dict:
    name = "model.base_model.model.blocks.0.self_attn.q.lora_{}.default.weight"
    return {"generator_ema": lora(name.format("A"), name.format("B"))(state), "step": 3}


def flat(prefix: str) -> Make:
    return single(lambda state: prefixed(state, prefix))


CAUSAL = {"config": {"transformer": {"causal_ar": True}}}
OWN = {"autorefiner": {"preset": "causal-forcing-2step"}}
CAUSAL_CLASS = {"_class_name": "CausalWanTransformer3DModel"}
CAUSAL_PIPELINE = {"transformer/config.json": CAUSAL_CLASS, "model_index.json": {}}
SFWAN = "SFWan2.1-T2V-1.3B-Diffusers"
CACHE = "hub/models--gdhe17--Self-Forcing/snapshots/0a1b2c/checkpoints/self_forcing_dmd.pt"
CF = "causal-forcing-framewise"

# fmt: off
CASES = (
    # Published names
    Case("checkpoints/self_forcing_dmd.pt", single(averaged), "self-forcing"),
    Case("self_forcing_sid.pt", single(averaged), "self-forcing"),
    Case("self_forcing_dmd (1).pt", single(averaged), "self-forcing"),
    Case(CACHE, single(averaged), "self-forcing"),
    Case("self_forcing_dmd.safetensors", flat("generator_ema.model."), "self-forcing"),
    Case("comfyui/self_forcing_dmd_bf16.safetensors", flat("diffusion_model."), "self-forcing"),
    Case("self_forcing_dmd_ema_as_generator.pt", single(generator), "self-forcing"),
    Case(SFWAN, folder("transformer", files=CAUSAL_PIPELINE),
         "self-forcing"),
    Case(f"hub/models--FastVideo--{SFWAN}/snapshots/0a1b/transformer",
         folder("", files={"config.json": CAUSAL_CLASS}), "self-forcing"),
    Case("a/cut", shards(one=True, stem="longlive_base"), "longlive"),
    Case(f"{SFWAN}/transformer", folder("", files={"config.json": CAUSAL_CLASS}), "self-forcing"),
    Case("autoregressive_checkpoint/model.pt", single(generator), "causvid"),
    Case("models/longlive_base.pt", single(generator), "longlive"),
    Case("longlive_base.safetensors", flat("generator.model."), "longlive"),
    Case("LongLive/both/longlive_base.pt", single(raw_beside_ema), "longlive"),
    Case("Causal-Forcing/chunkwise/causal_forcing.pt", single(raw_beside_ema), "causal-forcing"),
    Case("Causal-Forcing/framewise/causal_forcing.pt", single(sharded_ema), CF),
    Case("causal-forcing++/framewise-2step.pt", single(sharded_ema), "causal-forcing-2step"),
    Case("causal-forcing++/framewise-1step.pt", single(sharded_ema), "causal-forcing-1step"),
    Case("causal_forcing-framewise.safetensors", single(dict, CAUSAL), CF),
    Case("raven_model.pt", single(dict), "raven"),
    Case("cmgrpo_raven_merge.pt", single(dict), "raven"),
    Case("cmgrpo_raven_full.pt", single(peft_wrapped), "raven"),
    Case("rewardforcing.pt", flat("model."), "reward-forcing"),
    Case("one_forcing.pt",
         single(lambda s: {"generator": wrapped(s), "generator_ema": prefixed(OTHER, "")}),
         "one-forcing"),
    Case("Infinite-Forcing/ckpt/checkpoint_model_000500/model.pt", single(sharded_ema),
         "infinite-forcing"),
    Case("StreamDiffusionV2/wan_causal_dmd_v2v/model.pt", single(generator), "streamdiffusion-v2"),
    Case("self_forcing_dmd_fp8_scaled.safetensors", single(fp8("scale_weight", by_row=False)),
         "self-forcing", exact=False),
    Case("rewardforcing_fp8.safetensors", single(fp8("weight_scale", by_row=True)),
         "reward-forcing", exact=False),
    # Metadata
    Case("named.safetensors", single(dict, OWN), "causal-forcing-2step"),
    Case("krea-realtime-video-14b_named.safetensors", single(dict, OWN), "causal-forcing-2step"),
    Case("causal.safetensors", single(dict, CAUSAL), likely="self-forcing"),
    # Stages of training, and models that no preset samples
    Case("ode_init.pt", single(generator), likely="longlive"),
    Case("top/ode_init.pt", single(lambda s: {"model": wrapped(s)}), likely="self-forcing"),
    Case("wan_causal_ode_checkpoint_model_003000/model.pt", single(generator), likely="longlive"),
    Case("framewise/causal_ode.pt", single(generator), likely=CF),
    Case("framewise/causal_cd.pt", single(generator), likely=CF),
    Case("chunkwise/ar_diffusion.pt", single(generator), likely="longlive"),
    Case("self_forcing_ode_init_bf16.safetensors", flat("model."), likely="self-forcing"),
    Case("chunkwise/longvideo.pt", single(sharded_ema), likely="rolling-forcing"),
    Case("rolling_forcing_dmd.pt", single(sharded_ema), likely="rolling-forcing"),
    Case("hiar.pt", single(sharded_ema), likely=CF),
    # Layouts under uninformative names
    Case("plain.safetensors", single(dict), likely="raven"),
    Case("causal_forcing.pt", single(sharded_ema), likely="causal-forcing"),
    Case("memflow/base.pt", single(generator), likely="longlive"),
    Case("logs/checkpoint_model_000600/model.pt", single(averaged), likely="self-forcing"),
    Case("a/fsdp.pt", single(sharded_ema), likely=CF),
    Case("a/ddp.pt",
         single(lambda s: {"model": prefixed(s, "module."), "optimizer": {"state": {}}}),
         likely="raven"),
    Case("a/ddp_of_wrapper.safetensors", flat("module.model."), likely="raven"),
    Case("a/lightning.pt",
         single(lambda s: {"state_dict": prefixed(s, "generator.model."), "epoch": 1}),
         likely="longlive"),
    Case("a/lightning_ema.pt", single(lambda s: {"state_dict": prefixed(s, "generator_ema.model.")
         | prefixed(OTHER, "generator.")}), likely="self-forcing"),
    Case("a/pipeline.safetensors", single(pipeline), likely="longlive"),
    Case("a/both.safetensors", single(lambda s: prefixed(s, "generator_ema.model.")
         | {f"{role}.model.blocks.0.self_attn.q.weight": torch.zeros(2, 2)
            for role in ("generator", "critic")}),
         likely="self-forcing"),
    Case("a/merged_peft.safetensors", flat("model.base_model.model."), likely="raven"),
    Case("a/peft.pt", single(peft_wrapped), likely="raven"),
    Case("a/deeper.pt", single(lambda s: {"model": generator(s)}), likely="longlive"),
    Case("a/deeper_still.pt", single(lambda s: {"state_dict": averaged(s), "step": 1}),
         likely="self-forcing"),
    Case("a/shadow.pt", single(lambda s: {"generator_ema": {"shadow": wrapped(s), "decay": 0.99}}),
         likely="self-forcing"),
    Case("a/ema.pt", single(lambda s: {"model_ema": wrapped(s), "model": OTHER}),
         likely="self-forcing"),
    Case("a/compiled.safetensors", flat("_orig_mod."), likely="raven"),
    Case("a/twice.safetensors", flat("model.model."), likely="raven"),
    Case("a/dit.safetensors", flat("pipe.dit."), likely="raven"),
    Case("a/diffusers", folder("", files={"config.json": {"_class_name": "WanTransformer3DModel"}}),
         likely="raven"),
    Case("a/causal", folder("transformer", files=CAUSAL_PIPELINE),
         likely="self-forcing"),
    Case("a/shards", shards(one=False), likely="raven"),
    Case("a/one_shard", shards(one=True), likely="raven"),
    # Names that contradict the file
    Case("LongLive-1.3B/models/krea.safetensors", flat("generator.model."), likely="longlive"),
    Case("krea-realtime-video-14b.safetensors", flat("model."), likely="self-forcing"),
    Case("self_forcing_dmd_14b.safetensors", flat("model."), likely="self-forcing"),
    Case("longlive_14b.safetensors", flat("model."), likely="longlive"),
    Case("LongLive/self_forcing.safetensors", single(dict), likely="self-forcing"),
    Case("krea/self_forcing_dmd.pt", single(averaged), "self-forcing"),
    Case("not_longlive_base.pt", single(generator), likely="longlive"),
    Case("longlive_base_plus_lora.safetensors", flat("model."), likely="longlive"),
    Case("one_forcing_v0.pt", single(sharded_ema), likely="one-forcing"),
    # 14B
    Case("krea-realtime-video-14b.safetensors", large("model."), "krea-14b", large=True),
    Case("krea-realtime-video-14b_fp8_e4m3fn.safetensors", large("model."), "krea-14b", large=True),
    Case("self_forcing_dmd_14b.safetensors", large(""), "self-forcing-14b", large=True),
    Case("longlive_14b.safetensors", large("generator.model."), "longlive-14b", large=True),
    Case("wan_causal_dmd_v2v_14b/model.safetensors", large("generator.model."),
         "streamdiffusion-v2", large=True),
    Case("StreamDiffusionV2-14B/14b.safetensors", large("model."), likely="streamdiffusion-v2",
         large=True),
    Case("b/my_14b.safetensors", large("model."), likely="krea-14b", large=True),
    Case("b/generator_14b.safetensors", large("generator.model."), likely="longlive-14b",
         large=True),
    Case("b/longlive_called_krea.safetensors", large("model."), likely="longlive-14b", large=True),
    Case("b/self_forcing_dmd.safetensors", large("model."), likely="self-forcing-14b", large=True),
    Case("b/longlive_base.safetensors", large("model."), likely="longlive-14b", large=True),
    Case("b/wan2.1_t2v_14B_bf16.safetensors", large(""), likely="krea-14b", large=True),
    Case("b/wan2.2_t2v_high_noise_14B.safetensors", large(""), likely="krea-14b", large=True),
    Case("b/causal_folder", large_causal, likely="self-forcing-14b", large=True),
    Case("CausalWan2.2-A14B", large_expert, opens=False, large=True),
    Case("CausalWan2.2-half", alone, opens=False),
    # Other kinds
    Case("lora.pt",
         single(lambda s: {"generator_lora": lora("a.lora_A.weight", "a.lora_B.weight")(s)}),
         kind="lora"),
    Case("opsdv_longlive_lora.pt", single(average_only), kind="lora", opens=False),
    Case("kohya.safetensors", single(lora("lora_unet_blocks_0_ffn_0.lora_down.weight",
         "lora_unet_blocks_0_ffn_0.lora_up.weight")), kind="lora", opens=False),
    Case("diffusers.safetensors", single(lora("transformer.blocks.0.attn1.to_q.lora_A.weight",
         "transformer.blocks.0.attn1.to_q.lora_B.weight")), kind="lora", opens=False),
    Case("own.refiner.safetensors", single(lora("autorefiner.blocks.0.ffn.0.lora_A.weight",
         "autorefiner.blocks.0.ffn.0.lora_B.weight")), kind="refiner", opens=False),
    Case("vae.safetensors", single(lambda s: {"vae.decoder.head.0.gamma": torch.zeros(2)}),
         kind="vae", opens=False),
    Case("c/teacher_of.safetensors", flat("distilled_from."), kind="unknown", opens=False),
)
# Also opened by the tests in ComfyUI.
IN_COMFYUI = (
    "checkpoints/self_forcing_dmd.pt", "self_forcing_dmd.safetensors", SFWAN,
    "models/longlive_base.pt", "self_forcing_dmd_fp8_scaled.safetensors",
    "rewardforcing_fp8.safetensors", "causal-forcing++/framewise-2step.pt", "cmgrpo_raven_full.pt",
    "one_forcing.pt", "ode_init.pt", "a/lightning.pt", "a/deeper_still.pt",
    "a/merged_peft.safetensors", "a/one_shard", "CausalWan2.2-half",
    "LongLive-1.3B/models/krea.safetensors", "opsdv_longlive_lora.pt", "c/teacher_of.safetensors",
)
# fmt: on


def write_case(case: Case, root: Path, state: State) -> Path:
    """Write a case's file; return the path to open."""
    return case.make(root / case.name, state)


def small_state() -> State:
    return make_state(config=SMALL)
