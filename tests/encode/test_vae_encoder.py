import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import Tensor

from wan_core.encode import vae_encoder
from wan_core.encode.vae import Vae
from wan_core.encode.vae_encoder import PRECISIONS, FastEncoder, round_tf32

PUBLISHED = dict(base_dim=8, z_dim=16, num_res_blocks=1)
TWO_BLOCKS = dict(base_dim=8, z_dim=4, dim_mult=[1, 2, 2], num_res_blocks=2, temperal_downsample=[True, True],
                  latents_mean=[0.0] * 4, latents_std=[1.0] * 4)  # fmt: skip
PATCHED = dict(
    base_dim=8, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[True], in_channels=12, out_channels=12,
    patch_size=2,
)  # fmt: skip


def make_vae(seed: int = 0, **config: object) -> AutoencoderKLWan:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoencoderKLWan(**config).eval().requires_grad_(False)
        for name, value in model.named_parameters():
            if "gamma" in name:  # as made, norms scale by 1
                value.uniform_(0.5, 1.5)
    return model


def frames(*shape: int) -> Tensor:
    return torch.randint(0, 256, (*shape, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def expected(model: AutoencoderKLWan, video: Tensor) -> Tensor:
    return model.encode(video.permute(0, 4, 1, 2, 3).float() / 127.5 - 1).latent_dist.mode()


def apart(found: Tensor, reference: Tensor) -> float:
    assert found.shape == reference.shape
    return float((found - reference).norm() / reference.norm())


@pytest.mark.parametrize("config", [PUBLISHED, TWO_BLOCKS, PATCHED], ids=["published", "two-blocks", "patched"])
@pytest.mark.parametrize("shape", [(1, 1, 16, 24), (3, 5, 16, 16), (1, 9, 24, 16), (1, 17, 16, 16)])
@pytest.mark.parametrize("elements", [1, 1 << 28], ids=["chunks-of-4", "whole"])
def test_means_equal_those_of_diffusers(
    monkeypatch: pytest.MonkeyPatch, config: dict[str, object], shape: tuple[int, ...], elements: int
) -> None:
    monkeypatch.setattr(vae_encoder, "MAX_ELEMENTS", elements)
    model, video = make_vae(**config), frames(*shape)
    assert apart(FastEncoder(model, PRECISIONS["float32"])(video), expected(model, video)) < 5e-6


def test_81_frames_in_uneven_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    model, video = make_vae(**PUBLISHED), frames(1, 81, 16, 16)
    monkeypatch.setattr(vae_encoder, "MAX_ELEMENTS", (24 + 3) * 18 * 18 * 8)
    encoder = FastEncoder(model, PRECISIONS["float32"])
    assert encoder._chunks(video) == [(0, 25), (25, 49), (49, 73), (73, 81)]
    assert apart(encoder(video), expected(model, video)) < 5e-6


@pytest.mark.parametrize(("precision", "error"), [("tfloat32", 2e-3), ("bfloat16", 3e-2)])
def test_error_of_each_precision(precision: str, error: float) -> None:
    model, video = make_vae(**PUBLISHED), frames(1, 5, 16, 16).permute(0, 4, 1, 2, 3)
    found = apart(Vae(model, precision).encode(video), Vae(model, "float32").encode(video))
    assert error / 50 < found < error  # above the lower bound: it is another precision indeed


def test_tf32_is_the_nearest() -> None:
    x = torch.tensor([1 + 2**-10, 1 + 2**-11, 1 + 3 * 2**-11, -(1 + 2**-11 + 2**-20), 3e38, 0.0])
    wanted = torch.tensor([1 + 2**-10, 1.0, 1 + 2**-9, -(1 + 2**-10), 3e38, 0.0])
    assert torch.equal(round_tf32(x)[[0, 1, 2, 3, 5]], wanted[[0, 1, 2, 3, 5]])
    assert abs(round_tf32(x)[4] / 3e38 - 1) < 2**-11


def test_other_architectures_are_refused() -> None:
    with pytest.raises(ValueError, match=r"residual down blocks .* choose vae_dtype=float32"):
        Vae(make_vae(**PUBLISHED, is_residual=True), "bfloat16")


# On a GPU, at the published widths.


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("channels", "outputs"), [(96, 96), (96, 192), (384, 384)])
def test_convolution_of_the_gpu(dtype: torch.dtype, channels: int, outputs: int) -> None:
    from wan_core.encode.vae_kernels import conv3

    torch.manual_seed(0)
    padded = torch.randn(2, 5, 11, 23, channels, device="cuda")
    weight = torch.randn(outputs, channels, 3, 3, 3, device="cuda").contiguous(memory_format=torch.channels_last_3d)
    padded, weight = (round_tf32(x) if dtype == torch.float32 else x.to(dtype) for x in (padded, weight))
    weight = weight.contiguous(memory_format=torch.channels_last_3d)
    reference = F.conv3d(padded.cpu().double().permute(0, 4, 1, 2, 3), weight.cpu().double()).permute(0, 2, 3, 4, 1)
    error = {torch.bfloat16: 3e-3, torch.float16: 4e-4, torch.float32: 1e-5}[dtype]  # that of storing the result
    assert apart(conv3(padded, weight, dtype == torch.float32).cpu().double(), reference) < error


@pytest.mark.gpu
@pytest.mark.parametrize("tf32", [False, True])
def test_padding_and_norm_of_the_gpu(tf32: bool) -> None:
    from wan_core.encode.vae_kernels import write_padded

    torch.manual_seed(0)
    x, residual = (torch.randn(2, 3, 7, 12, 96)[:, :, :5, :10].cuda() for _ in range(2))
    bias, gamma = torch.randn(96).cuda(), torch.rand(96).cuda()
    padded, total = torch.full((2, 5, 7, 12, 96), 7.0).cuda(), torch.empty(2, 3, 5, 10, 96).cuda()
    write_padded(x, bias, residual, gamma, padded, total, tf32)
    torch.testing.assert_close(total, x + bias + residual)
    inner = F.silu(F.normalize(total, dim=-1) * gamma)
    torch.testing.assert_close(padded[:, 2:], F.pad(inner, (0, 0, 1, 1, 1, 1)), rtol=1e-3 if tf32 else 1e-5, atol=1e-6)
    assert (padded[:, :2] == 7).all()
    assert not tf32 or torch.equal(round_tf32(padded), padded)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("precision", "error"), [("float32", 1e-5), ("tfloat32", 2e-3), ("float16", 4e-3), ("bfloat16", 3e-2)]
)
@pytest.mark.parametrize("conv", ["triton", "cudnn"])
def test_error_on_the_gpu(precision: str, error: float, conv: str) -> None:
    if (precision, conv) == ("float32", "triton"):
        pytest.skip("float32 products are cuDNN's")
    model, video = make_vae(base_dim=96, num_res_blocks=1), frames(1, 9, 48, 64)
    reference = expected(model, video)
    found = FastEncoder(model.cuda(), PRECISIONS[precision], conv)(video.cuda())
    assert apart(found.cpu(), reference) < error


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["tfloat32", "bfloat16"])
def test_neighbours_in_a_batch_change_no_bit(precision: str) -> None:
    model = make_vae(base_dim=96, num_res_blocks=1).cuda()
    encoder, video = FastEncoder(model, PRECISIONS[precision]), frames(3, 9, 48, 64).cuda()
    alone = torch.cat([encoder(one[None]) for one in video])
    assert torch.equal(encoder(video), alone)
