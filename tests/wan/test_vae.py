"""The VAE: names, streaming in any split, gradients, width from the weights."""

import copy
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from autorefiner.refiner.wan import vae_layers
from autorefiner.refiner.wan.vae import DecoderState, WanVAE
from autorefiner.refiner.wan.vae_layers import channels_last, stacked_conv, volume, volume_conv

GOLDEN = Path(__file__).parents[1] / "golden" / "vae_weights.safetensors"


def splits(total: int) -> list[tuple[int, ...]]:
    """Return every way to split `total` latents into calls."""
    return [
        tuple(
            late - early
            for early, late in pairwise([0, *(i for i in range(1, total) if cut >> i & 1), total])
        )
        for cut in range(0, 1 << total, 2)
    ]


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return WanVAE(4)


@pytest.fixture
def latents() -> torch.Tensor:
    return torch.randn(1, 16, 5, 2, 4, generator=torch.Generator().manual_seed(0))


def test_names_and_shapes_are_the_published_ones() -> None:
    with torch.device("meta"):
        wide, narrow = WanVAE(96).state_dict(), WanVAE(8).state_dict()
    assert len(wide) == 194
    assert wide["decoder.head.0.gamma"].shape == (96, 1, 1, 1)
    assert wide["decoder.middle.1.norm.gamma"].shape == (384, 1, 1)
    with safe_open(GOLDEN, "pt") as file:
        stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert {name: tuple(tensor.shape) for name, tensor in narrow.items()} == stored


@torch.no_grad()
@pytest.mark.parametrize("split", splits(5), ids=str)
def test_every_split_decodes_to_the_same_pixels(vae, latents, split) -> None:
    whole, state = vae.decode(latents), DecoderState()
    pieces = [vae.decode(piece, state) for piece in latents.split(split, dim=2)]
    frames = [4 * n - 3 * (i == 0) for i, n in enumerate(split)]
    assert [piece.shape[2] for piece in pieces] == frames
    assert (torch.cat(pieces, 2) - whole).abs().max() < 3e-5


@torch.no_grad()
def test_a_batch_decodes_and_encodes_as_its_clips_do(vae, latents) -> None:
    both = torch.cat((latents, -latents))
    pixels = torch.rand(2, 3, 9, 16, 32, generator=torch.Generator().manual_seed(2)) * 2 - 1
    for whole, clips in (
        (vae.decode(both), [vae.decode(clip) for clip in both.split(1)]),
        (vae.encode(pixels), [vae.encode(clip) for clip in pixels.split(1)]),
    ):
        assert (whole - torch.cat(clips)).abs().max() < 3e-5
        assert (whole[0] - whole[1]).abs().max() > 1e-3


@torch.no_grad()
def test_only_a_single_clip_stacks_its_frames(vae, latents, monkeypatch) -> None:
    stacked = []
    monkeypatch.setattr(
        "autorefiner.refiner.wan.vae_layers.stacked_conv",
        lambda x, *rest: stacked.append(len(x)) or stacked_conv(x, *rest),
    )
    vae.decode(latents.expand(2, -1, -1, -1, -1))
    assert not stacked, "a batch is left to oneDNN, which is faster there"
    vae.decode(latents)
    assert set(stacked) == {1}


@torch.no_grad()
def test_long_inputs_go_through_in_pieces_and_give_the_same(vae, latents, monkeypatch) -> None:
    pixels = torch.rand(1, 3, 17, 16, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    whole = vae.decode(latents), vae.encode(pixels)
    monkeypatch.setattr("autorefiner.refiner.wan.vae.PIXELS_AT_ONCE", 1)
    calls = []
    vae.decoder.conv1.register_forward_hook(lambda *_: calls.append(1))
    assert (vae.decode(latents) - whole[0]).abs().max() < 3e-5
    assert len(calls) == 5
    assert (vae.encode(pixels) - whole[1]).abs().max() < 3e-5


def decoded_in_calls(vae: WanVAE, latents: torch.Tensor) -> torch.Tensor:
    """Decode 2, 2 and 1 latents in turn."""
    state = DecoderState()
    return torch.cat([vae.decode(piece, state) for piece in latents.split(2, dim=2)], dim=2)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_with_channels_last_give_the_same(vae, latents, monkeypatch, dtype) -> None:
    """No further from float64 than the plain weights; every 3-D convolution sees the format."""
    formats, convolve = [], vae_layers.F.conv3d

    def conv3d(x: torch.Tensor, weight: torch.Tensor, *args: object, **options: object):
        if weight.shape[2] > 1:
            last = torch.channels_last_3d
            formats.append((x.is_contiguous(memory_format=last), weight.stride(1) == 1))
        return convolve(x, weight, *args, **options)

    clips = torch.cat((latents, -latents))  # a batch takes the way of a GPU
    exact = decoded_in_calls(copy.deepcopy(vae).double(), clips.double())
    changed = copy.deepcopy(vae).to(dtype)
    plain = decoded_in_calls(changed, clips.to(dtype))
    monkeypatch.setattr(vae_layers.F, "conv3d", conv3d)
    pixels = decoded_in_calls(channels_last(changed), clips.to(dtype))
    rounding, error = ((each.double() - exact).square().mean() for each in (plain, pixels))
    assert error < 2 * rounding
    assert set(formats) == {(True, True)}


def test_a_volume_follows_the_weight_on_a_gpu() -> None:
    x = torch.empty(1, 3, 4, 6, 8, device="meta")  # B, T, C, H, W
    weight = torch.empty(8, 4, 3, 3, 3, device="meta")
    last = torch.channels_last_3d
    assert not volume(x, weight).is_contiguous(memory_format=last)
    assert volume(x, weight.to(memory_format=last)).is_contiguous(memory_format=last)
    point = torch.empty(8, 4, 1, 1, 1, device="meta")  # contiguous in either format
    assert not volume(x, point).is_contiguous(memory_format=last)


@torch.no_grad()
def test_a_compiled_decoder_gives_the_same_and_uses_its_graphs_again(latents) -> None:
    vae = WanVAE(4)
    graphs, compiled = [], copy.deepcopy(vae)

    def backend(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled.compile_decoder(
        lambda forward: torch.compile(forward, fullgraph=True, dynamic=False, backend=backend)
    )
    for _ in range(2):
        states = DecoderState(), DecoderState()
        for piece in latents[:, :, :4].split(2, dim=2):
            expected = vae.decode(piece, states[0])
            assert torch.equal(compiled.decode(piece, states[1]), expected)
        assert len(graphs) == 2


@torch.no_grad()
def test_a_cloned_state_goes_on_by_itself(vae, latents) -> None:
    whole, state = vae.decode(latents), DecoderState()
    vae.decode(latents[:, :, :2], state)
    fork = state.clone()
    vae.decode(-latents[:, :, 2:4], fork)
    rest = vae.decode(latents[:, :, 2:], state)
    assert (rest - whole[:, :, 5:]).abs().max() < 3e-5
    assert fork.nbytes == state.nbytes > 0


def test_the_state_does_not_grow(vae) -> None:
    state, sizes = DecoderState(), []
    with torch.no_grad():
        for _ in range(4):
            vae.decode(torch.zeros(1, 16, 3, 2, 4), state)
            sizes.append(sum(tensor.untyped_storage().nbytes() for tensor in state.last.values()))
    assert len(set(sizes)) == 1
    assert sizes[0] == state.nbytes


def test_gradients_through_a_stream_equal_those_of_the_whole(vae, latents) -> None:
    gradients = []
    for split in ((5,), (1, 1, 3)):
        vae.zero_grad()
        z, state = latents.clone().requires_grad_(), DecoderState()
        pixels = torch.cat([vae.decode(piece, state) for piece in z.split(split, dim=2)], 2)
        pixels.square().sum().backward()
        gradients.append((z.grad, vae.decoder.conv1.weight.grad.clone()))
    for whole, streamed in zip(*gradients, strict=True):
        assert whole.abs().max() > 0
        assert torch.allclose(whole, streamed, rtol=1e-4, atol=1e-5 * whole.abs().max().item())


@torch.no_grad()
def test_latents_are_normalised_with_wans_statistics(latents) -> None:
    torch.manual_seed(0)
    plain = WanVAE(4, latent_mean=0.0, latent_std=1.0)
    scaled = WanVAE.from_state_dict(plain.state_dict())
    raw = latents * scaled.latent_std.reshape(1, 16, 1, 1, 1) + scaled.latent_mean.reshape(
        1, 16, 1, 1, 1
    )
    assert torch.equal(scaled.denormalize(latents), raw)
    assert torch.allclose(scaled.normalize(raw), latents, atol=1e-5)
    assert torch.allclose(scaled.decode(latents), plain.decode(raw), atol=1e-5)
    pixels = torch.rand(1, 3, 5, 16, 16)
    assert torch.allclose(
        scaled.encode(pixels)[0, 3], (plain.encode(pixels)[0, 3] - 0.1075) / 2.6558, atol=1e-5
    )


@pytest.mark.parametrize("kernel", [(3, 3, 3), (3, 1, 1), (1, 1, 1)])
def test_stacked_frames_convolve_as_a_volume(kernel) -> None:
    generator = torch.Generator().manual_seed(0)
    x, bias = torch.randn(2, 6, 5, 8, 8, generator=generator), torch.randn(7, generator=generator)
    weight = torch.randn(7, 5, *kernel, generator=generator)
    assert torch.allclose(stacked_conv(x, weight, bias), volume_conv(x, weight, bias), atol=1e-4)


def test_the_estimate_covers_the_state(vae, latents) -> None:
    state = DecoderState()
    with torch.no_grad():
        vae.decode(latents, state)
    assert state.nbytes == WanVAE.state_bytes(4, 16, 32, torch.float32)
    assert state.nbytes < WanVAE.decode_bytes(4, 16, 32, 5, torch.float32) < 1e9


def test_wrong_input_is_one_clear_line(vae) -> None:
    with pytest.raises(ValueError, match=r"1 \+ 4n"):
        vae.encode(torch.zeros(1, 3, 4, 16, 16))
    for shape in ((1, 4, 5, 16, 16), (3, 3, 16, 16), (1, 3, 1, 0, 16)):
        with pytest.raises(ValueError, match="frames, height, width"):
            vae.encode(torch.zeros(shape))
    for shape in ((1, 4, 3, 2, 2), (1, 16, 2, 2), (1, 16, 0, 2, 2)):
        with pytest.raises(ValueError, match=r"expected \[batch, 16"):
            vae.decode(torch.zeros(shape))
    with pytest.raises(ValueError, match="latent_std"):
        WanVAE(4, latent_std=(1.0, 2.0, 3.0))
    with pytest.raises(ValueError, match="VAE"):
        WanVAE.from_state_dict({"a": torch.zeros(1)})
    with pytest.raises(ValueError, match="VAE"):
        WanVAE.from_state_dict({**vae.state_dict(), "decoder.head.0.gamma": torch.tensor(1.0)})
    with pytest.raises(ValueError, match=r"conv2\.weight"):
        WanVAE.from_state_dict({**vae.state_dict(), "conv2.weight": torch.zeros(48, 48, 1, 1, 1)})
    weights = dict(vae.state_dict())
    del weights["conv1.bias"]
    with pytest.raises(ValueError, match=r"conv1\.bias"):
        WanVAE.from_state_dict(weights)


@torch.no_grad()
@pytest.mark.parametrize("shape", [(2, 16, 1, 2, 4), (1, 16, 1, 4, 2)], ids=["batch", "size"])
def test_a_state_goes_on_with_its_own_video_only(vae, latents, shape) -> None:
    state = DecoderState()
    vae.decode(latents, state)
    before = dict(state.last)
    for other, z in ((vae, torch.zeros(shape)), (WanVAE(4), latents)):
        with pytest.raises(ValueError, match="DecoderState"):
            other.decode(z, state)
    assert state.last == before, "the refused call left no trace"
