"""What a run computes, as frozen dataclasses that are validated when constructed.

Two kinds of field live here. What is computed enters a stage's fingerprint; where or how often it is computed
(workers, GPUs, part sizes, intervals) does not, and is marked `place()`. A value that cannot work raises
`ValueError` with the value, the rule and the remedy. The text below a field is its description, also in the form of
Prefect's UI and in `wan keys`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal

from pydantic import ConfigDict

from wan_core.described import described
from wan_core.trainer_keys import check_trainer_key

VAE_TEMPORAL_STRIDE = 4
VAE_SPATIAL_STRIDE = 8
PATCH_SIZE = (1, 2, 2)  # frames, height, width, in latents
SIZE_MULTIPLE = VAE_SPATIAL_STRIDE * PATCH_SIZE[1]
TEXT_LENGTH = 512  # positions that cross-attention sees, see encode/text.py
IMAGE_LENGTH = 257  # tokens of CLIP ViT-H, one of them for the whole image: what image-to-video models attend to

Stage = Literal["encode", "shard", "index", "train", "convert", "sample", "evaluate"]
STAGES: tuple[Stage, ...] = ("encode", "shard", "index", "train", "convert", "sample", "evaluate")

STRICT = ConfigDict(extra="forbid")  # a misspelt key is an error, also in Prefect's form


def place(default: Any) -> Any:
    """A field that says where or how the work runs, never what it computes: left out of fingerprints."""
    return field(default=default, metadata={"identity": False})


def identity(config: Any) -> Any:
    """The part of a config that bears its identity, as plain JSON values."""
    if is_dataclass(config) and not isinstance(config, type):
        kept = [f for f in fields(config) if f.metadata.get("identity", True)]
        return {f.name: identity(getattr(config, f.name)) for f in kept}
    if isinstance(config, (list, tuple)):
        return [identity(value) for value in config]
    return config if isinstance(config, (str, int, float, bool, type(None))) else str(config)


def check(holds: bool, sentence: str) -> None:
    """Raise `ValueError(sentence)` unless `holds`; the sentence names value, rule and remedy."""
    if not holds:
        raise ValueError(sentence)


def check_num_frames(name: str, num_frames: int) -> None:
    below = max(1, (num_frames - 1) // 4 * 4 + 1)
    check(
        num_frames >= 1 and num_frames % VAE_TEMPORAL_STRIDE == 1,
        f"{name}={num_frames} is not 4n+1, which the VAE's temporal stride of 4 needs; choose {below} or {below + 4}",
    )


@described
@dataclass(frozen=True)
class Size:
    """Pixels of a video; both sides are multiples of 16 (VAE stride 8 x patch 2)."""

    height: int
    """Pixels, a multiple of 16."""
    width: int
    """Pixels, a multiple of 16."""
    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            value = getattr(self, name)
            low = max(SIZE_MULTIPLE, value // SIZE_MULTIPLE * SIZE_MULTIPLE)
            check(
                value >= SIZE_MULTIPLE and value % SIZE_MULTIPLE == 0,
                f"{name}={value} is not a positive multiple of {SIZE_MULTIPLE} (VAE stride 8 x patch 2); "
                f"choose {low} or {low + SIZE_MULTIPLE}",
            )

    @classmethod
    def parse(cls, text: str) -> Size:
        """Read `480x832` or `480*832` (height first)."""
        parts = text.lower().replace("*", "x").split("x")
        check(
            len(parts) == 2 and all(p.strip().isdigit() for p in parts),
            f"size {text!r} is not HEIGHTxWIDTH; write for example 480x832",
        )
        return cls(int(parts[0]), int(parts[1]))

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"


def num_tokens(num_frames: int, size: Size) -> int:
    """Tokens of a video: patches of its latents."""
    patches = size.height // SIZE_MULTIPLE * (size.width // SIZE_MULTIPLE)
    return ((num_frames - 1) // VAE_TEMPORAL_STRIDE + 1) * patches


@described
@dataclass(frozen=True)
class EncodeConfig:
    """Raw clips to latents and text embeddings."""

    sizes: tuple[Size, ...] = (Size(480, 832),)
    """Sizes of the encoded clips; a clip goes to the one of nearest aspect ratio."""
    tokens_per_sample: int = 0
    """Above 0: buckets of at most so many tokens, of several lengths and shapes, instead of `sizes` alone."""
    bucket_frames: tuple[int, ...] = (17, 33, 49, 81)
    """Lengths of buckets; their areas are those of `sizes`."""
    max_frames: int = 81
    """Frames of a clip at most, 4n+1; the rest is cut off."""
    min_frames: int = 5
    """Clips with fewer frames go to the quarantine."""
    fps: float = 16.0
    """Frames per second that clips are resampled to."""
    mode: Literal["video", "frames"] = "video"
    """video, or frames: one latent per clip, from its first frame."""
    center_crop: bool = True
    """Cut to the size's aspect ratio; False stretches."""
    window_frames: int = 0
    """Above 0: long clips are cut into windows of so many frames (at `fps`)."""
    window_stride: int = 0
    """Frames from one window's start to the next's; 0: `window_frames`."""
    scene_detector: Literal["none", "content", "adaptive"] = "none"
    """PySceneDetect's detector; clips end at its cuts."""
    scene_threshold: float = 0.0
    """Of the scene detector; 0: its own."""
    vae_dtype: Literal["float32", "float16x3", "float16", "bfloat16"] = "float32"
    """What the VAE's products are of."""
    text_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Arithmetic of the text encoder. Never float16: UMT5 overflows to zeros."""
    clips_per_part: int = place(64)
    """Clips that one task encodes; a failure costs at most this much work."""
    decode_threads: int = place(4)
    """Of one worker; as many decoded clips wait in memory, and one more."""
    max_quarantine_share: float = place(0.2)
    """The stage fails when a larger share of the clips cannot be used."""
    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        check(len(self.sizes) > 0, "sizes=() is empty; give at least one HEIGHTxWIDTH, for example 480x832")
        check_num_frames("max_frames", self.max_frames)
        check_num_frames("min_frames", self.min_frames)
        check(
            self.min_frames <= self.max_frames,
            f"min_frames={self.min_frames} exceeds max_frames={self.max_frames}; lower min_frames",
        )
        self._check_buckets()
        self._check_ranges()
        check(self.fps > 0, f"fps={self.fps} is not positive; WAN 2.1 was trained at 16")
        check(self.clips_per_part >= 1, f"clips_per_part={self.clips_per_part} is below 1; choose 64")
        check(self.decode_threads >= 1, f"decode_threads={self.decode_threads} is below 1; choose 4")
        check(
            0 <= self.max_quarantine_share <= 1,
            f"max_quarantine_share={self.max_quarantine_share} is not a share; choose a value in [0, 1]",
        )

    def _check_buckets(self) -> None:
        check(len(self.bucket_frames) > 0, "bucket_frames=() is empty; give lengths of 4n+1 frames, for example 17,49")
        for num_frames in self.bucket_frames:
            check_num_frames("bucket_frames", num_frames)
        smallest = min(self.sizes, key=lambda size: size.height * size.width)
        least = num_tokens(1 if self.mode == "frames" else min(self.bucket_frames), smallest)
        check(
            self.tokens_per_sample == 0 or self.tokens_per_sample >= least,
            f"tokens_per_sample={self.tokens_per_sample} is below {least}, the tokens of the smallest bucket "
            f"({smallest}); raise it, add a smaller size or shorter bucket_frames, or set 0 for no buckets",
        )

    def _check_ranges(self) -> None:
        if self.window_frames:
            check_num_frames("window_frames", self.window_frames)
            check(
                self.min_frames <= self.window_frames <= self.max_frames,
                f"window_frames={self.window_frames} is not between min_frames={self.min_frames} and "
                f"max_frames={self.max_frames}; choose {self.max_frames}, or 0 for whole clips",
            )
        check(
            self.window_stride == 0 or (self.window_stride > 0 and self.window_frames > 0),
            f"window_stride={self.window_stride} needs window_frames > 0 and must not be negative; "
            "set window_frames, or window_stride=0",
        )
        check(
            self.scene_threshold == 0 or (self.scene_threshold > 0 and self.scene_detector != "none"),
            f"scene_threshold={self.scene_threshold} needs scene_detector=content (its own is 27) or adaptive (3) "
            "and must not be negative; choose a detector, or scene_threshold=0",
        )


@described
@dataclass(frozen=True)
class ShardConfig:
    """Parts to shuffled WebDataset shards, split by clip digest."""

    max_samples: int = 1000
    """Samples of one shard at most."""
    max_bytes: int = 1 << 30
    """Bytes of one shard at most."""
    val_share: float = 0.02
    """Share of the clips that validation keeps; the split follows a clip's digest."""
    test_share: float = 0.0
    """Share of the clips that nothing but a test may see."""
    seed: int = 0
    """Seed of the samples' order in the shards."""
    workers: int = place(4)
    """Shards that are written at a time."""
    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        check(self.max_samples >= 1, f"max_samples={self.max_samples} is below 1; choose 1000")
        check(self.max_bytes >= 1, f"max_bytes={self.max_bytes} is below 1; choose 1073741824 (1 GiB)")
        check(self.workers >= 1, f"workers={self.workers} is below 1; choose 4")
        check(
            self.val_share >= 0 and self.test_share >= 0 and self.val_share + self.test_share < 1,
            f"val_share={self.val_share} and test_share={self.test_share} leave no training data; "
            "choose shares >= 0 whose sum is below 1",
        )


@described
@dataclass(frozen=True)
class IndexConfig:
    """Energon metadata."""

    workers: int = place(2)
    """Processes that read the shards."""
    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        check(self.workers >= 1, f"workers={self.workers} is below 1; choose 2")


# Override keys (and key prefixes) that say how long, how often or where to train: free to change when a run resumes.
RESUMABLE_KEYS = (
    "train.train_iters", "validation.", "stability.", "checkpoint.", "logger.", "dist.",
    "ddp.", "profiling.", "dataset.num_workers", "model.tensor_model_parallel_size", "model.sequence_parallel",
    "model.context_parallel_size", "model.pipeline_model_parallel_size", "model.recompute_",
)  # fmt: skip


@described
@dataclass(frozen=True)
class TrainConfig:
    """One training run: a recipe, a mode and overrides in the keys of Bridge's ConfigContainer."""

    recipe: str = "wan_1_3b"
    """Name of a file of wan_core/conf."""
    mode: Literal["pretrain", "finetune"] = "pretrain"
    """pretrain starts from random weights, finetune from the model's."""
    overrides: tuple[str, ...] = ()
    """key=value in the trainer's own keys, for example train.train_iters=1000."""
    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        for text in self.overrides:
            key, equals, _ = text.partition("=")
            check(
                bool(equals) and bool(key.strip()),
                f"override {text!r} is not key=value; write for example train.train_iters=1000",
            )
            check_trainer_key(key.strip())

    def resumable(self) -> TrainConfig:
        """This config without the overrides that a resumed run may change: its fingerprint names the run folder."""
        kept = tuple(text for text in self.overrides if not text.partition("=")[0].startswith(RESUMABLE_KEYS))
        return replace(self, overrides=kept)


@described
@dataclass(frozen=True)
class ConvertConfig:
    """Checkpoint to Diffusers folder."""

    iteration: int | None = None
    """Checkpoint to convert; empty: the latest."""
    weights: Literal["model", "ema"] = "model"
    """ema: their moving averages, of a run with optimizer.ema_decay."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the written weights."""
    __pydantic_config__ = STRICT


NEGATIVE_PROMPT = (  # the default of Wan2.1's own generate.py; the model was trained to be steered away from it
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)


@described
@dataclass(frozen=True)
class SampleConfig:
    """Videos from prompts."""

    prompts: tuple[str, ...] = ()
    """One video each."""
    negative_prompt: str = NEGATIVE_PROMPT
    """What guidance leads away from."""
    size: Size = Size(480, 832)
    """Size of the videos."""
    num_frames: int = 81
    """Frames of each video, 4n+1."""
    fps: float = 16.0
    """Frames per second of the written videos."""
    num_steps: int = 50
    """Steps of the sampler."""
    guidance_scale: float = 5.0
    """Strength of classifier-free guidance; 1: none."""
    shift: float = 5.0
    """Shift of the noise levels: 3 at 480p, 5 at 720p."""
    seed: int = 0
    """Prompt i uses seed + i."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Arithmetic of the transformer."""
    batch_tokens: int = place(1)
    """Prompts are packed into one forward up to this many tokens; at least one prompt."""
    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        check_num_frames("num_frames", self.num_frames)
        check(self.num_steps >= 1, f"num_steps={self.num_steps} is below 1; WAN 2.1's default is 50")
        check(self.shift > 0, f"shift={self.shift} is not positive; choose 3.0 at 480p or 5.0 at 720p")
        check(
            self.guidance_scale >= 1, f"guidance_scale={self.guidance_scale} is below 1 (1 = no guidance); choose 5.0"
        )


@described
@dataclass(frozen=True)
class EvaluateConfig:
    """Metrics and report over samples."""

    checker: Literal["none", "shapes"] = "none"
    """shapes measures colour, shape and direction of the demo's prompts."""
    __pydantic_config__ = STRICT


@described
@dataclass(frozen=True)
class RayConfig:
    """Where encode runs: Ray actors, each holding one VAE and one text encoder."""

    address: str | None = None
    """Address of a Ray cluster, for example ray://head:10001; empty: a Ray of this run's own on this machine."""
    actors: int = 1
    """Encoders that work side by side, one per GPU."""
    gpus_per_actor: float = 0.0
    """GPUs of each; 0 encodes on CPUs."""
    cpus_per_actor: float = 1.0
    """CPU cores that Ray sets aside for each."""
    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        check(self.actors >= 1, f"actors={self.actors} is below 1; choose 1 per GPU")


@described
@dataclass(frozen=True)
class LaunchConfig:
    """Where train runs: torchrun on this machine, on the nodes of a Ray cluster, or under Slurm."""

    launcher: Literal["local", "ray", "slurm"] = "local"
    """torchrun on this machine, on the nodes of the Ray cluster, or under Slurm."""
    nodes: int = 1
    """Machines that train."""
    processes_per_node: int = 1
    """Ranks on each machine, one per GPU."""
    gpus_per_node: int = 0
    """GPUs of each machine; 0 trains on CPUs with gloo."""
    min_nodes: int | None = None
    """With Ray: machines that an attempt may begin with when there are not enough; empty: all of `nodes`."""
    placement_seconds: float = 300.0
    """With Ray: how long to wait for the machines; an autoscaling cluster may have to start them."""
    stop_seconds: float = 20.0
    """How long the ranks may take to save and end when a run is cancelled; a Prefect worker kills after 30."""
    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        check(self.nodes >= 1, f"nodes={self.nodes} is below 1; choose 1")
        check(
            self.processes_per_node >= 1, f"processes_per_node={self.processes_per_node} is below 1; choose 1 per GPU"
        )
        check(
            self.launcher != "local" or self.nodes == 1,
            f"launcher='local' cannot start nodes={self.nodes}; choose launcher='ray' or 'slurm', or nodes=1",
        )
        check(
            self.min_nodes is None or 1 <= self.min_nodes <= self.nodes,
            f"min_nodes={self.min_nodes} is not between 1 and nodes={self.nodes}; leave it empty to need all of them",
        )


@described
@dataclass(frozen=True)
class PipelineConfig:
    """The end-to-end flow: one config per stage, and where the two heavy stages run."""

    name: str = "wan"
    """Names the dataset and the run inside the workspace."""
    encode: EncodeConfig = EncodeConfig()
    shard: ShardConfig = ShardConfig()
    index: IndexConfig = IndexConfig()
    train: TrainConfig = TrainConfig()
    convert: ConvertConfig = ConvertConfig()
    sample: SampleConfig = SampleConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    ray: RayConfig = RayConfig()
    launch: LaunchConfig = LaunchConfig()
    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        check(
            bool(self.name) and all(c.isalnum() or c in "-_" for c in self.name),
            f"name={self.name!r} is not made of letters, digits, - and _; it names folders, so choose another",
        )
