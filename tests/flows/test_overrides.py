import pytest

from flows.overrides import apply_overrides
from wan_core.config import PipelineConfig, Size

BASE = PipelineConfig()


def test_values_reach_their_fields_and_the_trainer() -> None:
    config = apply_overrides(
        BASE,
        [
            "encode.sizes=480x832, 832*480", "encode.max_frames=49", "encode.bucket_frames=9,17",
            "sample.size=64x96", "sample.prompts=[a, b]",
            "sample.negative_prompt=no: thing", "convert.iteration=null", "name=mine", "ray.actors=3",
            "train.train_iters=7", "optimizer.lr=1e-5", "flow_matching.shift=3",
        ],
    )  # fmt: skip
    assert config.encode.sizes == (Size(480, 832), Size(832, 480)) and config.encode.max_frames == 49
    assert config.encode.bucket_frames == (9, 17)
    assert config.sample.size == Size(64, 96) and config.sample.prompts == ("a", "b")
    assert config.sample.negative_prompt == "no: thing" and config.convert.iteration is None
    assert config.name == "mine" and config.ray.actors == 3
    assert config.train.overrides == ("train.train_iters=7", "optimizer.lr=1e-5", "flow_matching.shift=3")
    assert config.shard == BASE.shard


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("encode.max_frame=49", "encode.max_frame is no key of the config; did you mean encode.max_frames?"),
        ("enode.fps=8", "did you mean encode.fps?"),
        ("optimiser.lr=1", "did you mean optimizer."),
        ("optimizer.lrr=1", "optimizer.lrr is no key of the trainer; did you mean optimizer.lr?"),
        ("model.num_layer=2", "did you mean model.num_layers?"),
        ("encode.max_frames=82", "max_frames=82 is not 4n+1"),
        ("encode.max_frames=many", "encode.max_frames='many': input should be a valid integer"),
        ("encode.sizes=480", "size '480' is not HEIGHTxWIDTH"),
        ("sample.size=100x100", "height=100 is not a positive multiple of 16"),
        ("encode.bucket_frames=9,ten", "encode.bucket_frames"),
        ("encode.window_stride=8", "window_stride=8 needs window_frames"),
        ("encode.mode=audio", "encode.mode='audio'"),
        ("encode.fps", "'encode.fps' is not key=value"),
        ("sample.prompts=[a", "is not YAML"),
        ("launch.nodes=2", "launcher='local' cannot start nodes=2"),
    ],
)
def test_a_wrong_override_is_one_sentence(override: str, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        apply_overrides(BASE, [override])
    assert words in str(caught.value) and "\n" not in str(caught.value)
