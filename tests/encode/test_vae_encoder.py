import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import Tensor

from wan_core.encode import vae_encoder
from wan_core.encode.vae import Vae
from wan_core.encode.vae_encoder import FastEncoder
from wan_core.encode.vae_precision import PRECISIONS, halved

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


@pytest.mark.parametrize(("precision", "error"), [("float16x3", 2e-5), ("float16", 2e-3), ("bfloat16", 3e-2)])
def test_error_of_each_precision(precision: str, error: float) -> None:
    vae = Vae(make_vae(**PUBLISHED), precision)
    found = vae.error(frames(1, 5, 16, 16).permute(0, 4, 1, 2, 3))
    assert error / 1000 < found < error  # above the lower bound: it is another precision indeed


def test_two_halves_make_a_whole() -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    high, low = halved(x, torch.float16, 2)
    assert high.dtype == low.dtype == torch.float16
    assert float((high.double() + low.double() - x).abs().max()) < 2**-20 < float((high - x).abs().max())


def test_other_architectures_are_refused() -> None:
    with pytest.raises(ValueError, match=r"residual down blocks .* choose vae_dtype=float32"):
        Vae(make_vae(**PUBLISHED, is_residual=True), "bfloat16")


def test_sizes_beyond_the_kernels_offsets_are_refused_and_no_others() -> None:
    """Five frames and two of the past, 96 channels, one or two terms, below 2^31 elements."""
    with torch.device("meta"):
        model = AutoencoderKLWan()
    for precision, size, frames, works in (
        ("float16x3", (1088, 1920), 81, False), ("float16x3", (1088, 1920), 1, True),
        ("float16x3", (720, 1280), 81, True), ("float16", (1088, 1920), 81, True), ("float16", (1440, 2560), 81, False),
        ("bfloat16", (1440, 2560), 5, False), ("bfloat16", (1440, 2560), 1, True),
        ("float32", (4320, 7680), 81, True),
    ):  # fmt: skip
        vae, terms = Vae(model, precision), 2 if precision == "float16x3" else 1
        if vae.fast:
            padded = terms * (2 + min(frames, 5)) * (size[0] + 2) * (size[1] + 2) * 96
            assert works == (padded < 2**31)
        if works:
            vae.check_shape((frames, *size))
            continue
        words = f"size {size[0]}x{size[1]} is too large for vae_dtype={precision}, .*; choose vae_dtype=float32"
        with pytest.raises(ValueError, match=words):
            vae.check_shape((frames, *size))


# On a GPU, at the published widths.


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "terms", "error"),  # with two terms what is left is the tensor cores' sum, 5.3e-5 over 10,368 products
    [("bfloat16", 1, 3e-3), ("float16", 1, 4e-4), ("float16", 2, 1e-4)],
)
@pytest.mark.parametrize(("channels", "outputs"), [(8, 96), (96, 192), (384, 384)])
@pytest.mark.parametrize("rows", [0, 128])  # 128: what cards of less shared memory take
def test_convolution_of_the_gpu(dtype: str, terms: int, error: float, channels: int, outputs: int, rows: int) -> None:
    from wan_core.encode.vae_kernels import conv3, conv_table

    torch.manual_seed(0)
    product, partial = getattr(torch, dtype), torch.float32 if terms == 2 else getattr(torch, dtype)
    padded, weight = torch.randn(2, 5, 11, 23, channels).cuda(), torch.randn(outputs, channels, 3, 3, 3).cuda()
    table = conv_table(weight, product, terms)
    found = conv3(torch.stack(halved(padded, product, terms)), table, partial, rows)
    if terms == 1:  # the operands' rounding is not the kernel's
        padded, weight = padded.to(product), weight.to(product)
    reference = F.conv3d(padded.cpu().double().permute(0, 4, 1, 2, 3), weight.cpu().double()).permute(0, 2, 3, 4, 1)
    assert apart(found.cpu().double(), reference) < error


@pytest.mark.gpu
@pytest.mark.parametrize("terms", [1, 2])
def test_padding_and_norm_of_the_gpu(terms: int) -> None:
    from wan_core.encode.vae_kernels import write_padded

    torch.manual_seed(0)
    x, residual = (torch.randn(2, 3, 7, 12, 96)[:, :, :5, :10].cuda() for _ in range(2))
    bias, gamma = torch.randn(96).cuda(), torch.rand(96).cuda()
    padded, total = torch.full((terms, 2, 5, 7, 12, 96), 7.0).cuda().half(), torch.empty(2, 3, 5, 10, 96).cuda()
    write_padded(x, bias, residual, gamma, padded, total)
    torch.testing.assert_close(total, x + bias + residual)
    inner = F.pad(F.silu(F.normalize(total, dim=-1) * gamma), (0, 0, 1, 1, 1, 1))
    torch.testing.assert_close(padded.float().sum(0)[:, 2:], inner, rtol=1e-3 if terms == 1 else 1e-5, atol=1e-6)
    assert (padded[:, :, :2] == 7).all()
    below = torch.full((1, 2, 3, 6, 11, 96), 7.0).cuda()
    write_padded(x, None, None, None, below, None)
    assert torch.equal(below[0], F.pad(x, (0, 0, 0, 1, 0, 1)))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("precision", "error"), [("float32", 2e-5), ("float16x3", 5e-5), ("float16", 2e-3), ("bfloat16", 3e-2)]
)
def test_error_on_the_gpu(monkeypatch: pytest.MonkeyPatch, precision: str, error: float) -> None:
    model, video = make_vae(base_dim=96, num_res_blocks=1), frames(1, 9, 48, 64)
    reference = expected(model, video)
    encoder = FastEncoder(model.cuda(), PRECISIONS[precision])
    assert apart(encoder(video.cuda()).cpu(), reference) < error
    monkeypatch.setattr(vae_encoder, "MAX_ELEMENTS", 1)
    assert apart(encoder(video.cuda()).cpu(), reference) < error
