"""The configuration tree: what may be left out, and what is refused before anything starts."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from bitdistill_ray.config import Config, QuantConfig, StudentConfig
from bitdistill_ray.core import Format, Granularity, QuantSpec
from bitdistill_ray.errors import ConfigError
from bitdistill_ray.loss_config import AdaptiveWeight, LossConfig, RelationConfig
from bitdistill_ray.recipe import check
from bitdistill_ray.stage_config import ClipStage, DistillStage, SourceConfig

ROAD: dict[str, Any] = {"write": None, "refine": None, "clip": None, "distill": None, "export": None}


def tree(**sections: Any) -> dict[str, Any]:
    return {"stages": dict(ROAD), **sections}


def test_a_stage_takes_its_kind_from_its_name() -> None:
    config = check(tree(stages={"write": None, "refine": {}, "first": {"kind": "distill", "tokens": 5}}))
    assert [stage.kind for stage in config.stages.values()] == ["write", "refine", "distill"]
    assert list(config.stages) == ["write", "refine", "first"]


def test_false_drops_a_stage() -> None:
    config = check(tree(stages={**ROAD, "clip": False}))
    assert "clip" not in config.stages
    assert not any(isinstance(stage, ClipStage) for stage in config.stages.values())


@pytest.mark.parametrize("data", ["/corpus", ["/corpus"], {"sources": "/corpus"}, {"sources": {"path": "/corpus"}}])
def test_a_corpus_can_be_a_path_alone(data: Any) -> None:
    assert check(tree(data=data)).data.sources == (SourceConfig(path="/corpus"),)


def test_sources_can_have_weights() -> None:
    entries = [{"source": "/a", "weight": 3}, {"path": "/b", "weight": 1, "text_column": "t"}]
    expected = (SourceConfig(path="/a", weight=3), SourceConfig(path="/b", weight=1, text_column="t"))
    assert check(tree(data=entries)).data.sources == expected
    assert check(tree(data={"sources": entries})).data.sources == expected
    with pytest.raises(ConfigError, match="/b has no weight, and other sources have one"):
        check(tree(data=[{"source": "/a", "weight": 3}, "/b"]))
    for weight in (0, -1, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match=r"data\.sources\.0\.weight"):
            check(tree(data=[{"source": "/a", "weight": weight}]))


def test_a_data_set_of_the_hub_is_named_in_full() -> None:
    for path in ("hub:org/name", "hub:org/name:config", "hub:org/name::test:column"):
        assert check(tree(data=path)).data.sources == (SourceConfig(path=path),)
    for path in ("hub:name", "hub:org/name/more", "hub:org/name:a:b:c:d"):
        with pytest.raises(ConfigError, match=r"not a data set's name\. Write hub:ORG/NAME"):
            check(tree(data=path))


def test_the_quantisation_section_is_a_quant_spec() -> None:
    quant = QuantConfig(format=Format.TERNARY, granularity=Granularity.TENSOR, group_size=None, activation_bits=8)
    expected = QuantSpec(format=Format.TERNARY, granularity=Granularity.TENSOR, group_size=None, activation_bits=8)
    assert quant.spec == expected


def test_a_configuration_cannot_be_changed_in_place() -> None:
    config = check(tree())
    with pytest.raises(ValidationError, match="frozen"):
        config.student.workers = 2  # type: ignore[misc]


@given(workers=st.integers(1, 9), micro_batch=st.integers(1, 9), sequences=st.integers(1, 200))
def test_a_batch_that_is_accepted_divides_into_equal_micro_batches_that_fit(
    workers: int, micro_batch: int, sequences: int
) -> None:
    """The feeder hands out equal shares: what is accepted must divide, and no share may pass `micro_batch`."""
    student = StudentConfig(workers=workers, micro_batch=micro_batch)
    stages = {**ROAD, "distill": {"batch_sequences": sequences}}
    share, rest = divmod(sequences, workers * student.passes(sequences))
    if rest:
        assert sequences % (workers * micro_batch), "a multiple, as the remedy proposes, must be accepted"
        with pytest.raises(ConfigError, match=r"^stages\.distill\.batch_sequences: "):
            check(tree(stages=stages, student=student.model_dump()))
    else:
        assert 1 <= share <= micro_batch
        check(tree(stages=stages, student=student.model_dump()))


IMPOSSIBLE: list[tuple[dict[str, Any], str, str, str]] = [
    (tree(quant={"group_size": 4}), "quant.group_size", "4 with group scales", "at least 8"),
    (tree(quant={"granularity": "tensor"}), "quant.group_size", "128 with per-tensor", "Leave group_size empty"),
    (tree(quant={"granularity": "tensor", "group_size": None}), "quant.granularity", "tensor with nf3", "=group"),
    (tree(quant={"granularity": "block", "format": "int2"}), "quant.granularity", "block with int2", "ternary only"),
    (tree(quant={"activation_bits": 4}), "quant.activation_bits", "4", "Use 8"),
    (
        tree(student={"workers": 3, "micro_batch": 2}),
        "stages.distill.batch_sequences",
        "8 do not divide among 3 workers with 2 micro-batches",
        "a multiple of 6",
    ),
    (
        tree(student={"micro_batch": 3}),
        "stages.distill.batch_sequences",
        "8 do not divide among 1 workers with 3 micro-batches",
        "a multiple of 3",
    ),
    (
        tree(stages={**ROAD, "distill": {"loss": {"jsd": 1, "temperature": 2}}}, teacher={"payload": "topk"}),
        "stages.distill.loss.temperature",
        "2.0 with teacher.payload=topk",
        "teacher.payload=hidden",
    ),
    (
        tree(stages={**ROAD, "distill": {"loss": {"jsd": 1}}}, teacher={"payload": "sampled"}),
        "stages.distill.loss.jsd",
        "1.0 with teacher.payload=sampled",
        "Use forward_kl",
    ),
    (
        tree(stages={**ROAD, "distill": {"loss": {"cakld": 0.5, "forward_kl": 1}}}, teacher={"payload": "sampled"}),
        "stages.distill.loss.cakld",
        "0.5 with teacher.payload=sampled",
        "teacher.payload=hidden",
    ),
    (
        tree(stages={**ROAD, "distill": {"loss": {"forward_kl": 1, "temperature": 2}}}, teacher={"payload": "sampled"}),
        "stages.distill.loss.temperature",
        "2.0 with teacher.payload=sampled, drawn at 1",
        "Use temperature 1",
    ),
    (
        tree(teacher={"cache": {"folder": "s3://bucket/cache", "coding": "compact"}}),
        "teacher.cache.coding",
        "compact with teacher.payload=hidden",
        "Use lossless, or teacher.payload=topk",
    ),
    (tree(stages={**ROAD, "write": False}), "stages.clip", "no text for it", "Set data=PATH"),
    (
        tree(stages={"refine": None, "distill": {"sources": "written"}}, data="/corpus"),
        "stages.distill",
        "no text for it",
        "`write` stage before it",
    ),
    (tree(stages={"finetune": {"sources": "task"}}, data="/corpus"), "stages.finetune", "no text", "data.task=PATH"),
    (tree(stages={"refine": {"subln": "all"}}), "stages.refine", "no text for it", "Set data=PATH"),
    (tree(stages={"distill": None, "refine": None}, data="/corpus"), "stages.distill", "needs a student", "`refine`"),
    (tree(stages={"write": None, "export": None}), "stages.export", "needs a student", "Put `refine` before it"),
]


@pytest.mark.parametrize(("content", "key", "value", "remedy"), IMPOSSIBLE, ids=[f"{i[1]}-{i[2]}" for i in IMPOSSIBLE])
def test_what_cannot_work_is_refused_in_one_line(content: dict[str, Any], key: str, value: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        check(content)
    assert refusal.value.where == key
    assert value in refusal.value.what
    assert remedy in refusal.value.remedy
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("loss", "key", "what"),
    [
        ({"ce": 0}, "loss", "every weight is 0"),
        ({"ce": 1, "gamma": "max"}, "loss.gamma", "max without cakld"),
        ({"cakld": 1, "gamma": 1.5}, "loss.gamma", "1.5"),
        ({"relation": {"weight": "adaptive"}}, "loss.relation.weight", "adaptive against others, which there are none"),
        (
            {"forward_kl": 1, "relation": {"weight": {"against": "ce"}}},
            "loss.relation.weight",
            "adaptive against ce, which there are none",
        ),
        ({"jsd": 1, "temperature_squared": True}, "loss.temperature_squared", "no effect"),
        ({"cakld": 1, "gamma": "per-token", "kl_scope": "present"}, "loss.kl_scope", "present with gamma per token"),
    ],
)
def test_a_loss_that_says_nothing_or_too_much_is_refused(loss: dict[str, Any], key: str, what: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        check(tree(stages={**ROAD, "distill": {"loss": loss}}))
    assert refusal.value.where == key
    assert what in refusal.value.what


def test_settings_of_a_kl_are_named_where_there_is_none() -> None:
    def unused(loss: Any) -> tuple[str, ...]:
        return check(tree(stages={**ROAD, "distill": {"loss": loss}})).unused

    soft = {"ce": 1, "temperature": 5, "temperature_squared": True, "kl_scope": "present"}
    assert unused({**soft, "forward_kl": 1}) == ()
    keys = [line.partition(":")[0] for line in unused(soft)]
    assert keys == [f"stages.distill.loss.{key}" for key in ("temperature", "temperature_squared", "kl_scope")]


def test_a_loss_by_its_name_is_that_term_alone() -> None:
    config = check(tree(stages={**ROAD, "distill": {"loss": "ce"}}))
    stage = config.stages["distill"]
    assert isinstance(stage, DistillStage)
    assert stage.loss == LossConfig(ce=1)


def test_an_adaptive_weight_is_a_word_or_a_section() -> None:
    for weight in ("adaptive", {}, AdaptiveWeight()):
        assert RelationConfig(weight=weight).weight == AdaptiveWeight()  # type: ignore[arg-type]
    assert RelationConfig.model_validate({"weight": {"ratio": 0.3, "every": 7}}).weight == AdaptiveWeight(
        ratio=0.3, every=7
    )
    loss = {"ce": 1, "relation": {"weight": "adaptive"}}
    with pytest.raises(ConfigError, match=r"relation\.weight: adaptive under ZeRO-3"):
        check(tree(stages={**ROAD, "distill": {"loss": loss}}, student={"zero": 3}))
    with pytest.raises(ConfigError, match=r"relation\.weight: adaptive in fp16"):
        check(tree(stages={**ROAD, "distill": {"loss": loss}}, student={"dtype": "fp16"}))


SEARCHED: dict[str, Any] = {"loss": {"ce": 1, "relation": {"weight": 1, "layer": "search"}}}


def test_a_layer_is_searched_where_a_search_comes_before() -> None:
    config = check(tree(stages={"write": None, "refine": None, "search": {"layers": [0, 1]}, "distill": SEARCHED}))
    assert config.searching("search") == "distill"
    with pytest.raises(ConfigError, match=r"relation\.layer: search, and no `search` stage comes before it"):
        check(tree(stages={"write": None, "refine": None, "distill": SEARCHED, "search": {"layers": [0, 1]}}))
    with pytest.raises(ConfigError, match=r"stages\.search: no later stage has loss\.relation\.layer=search"):
        check(tree(stages={"write": None, "refine": None, "search": {"layers": [0, 1]}, "distill": None}))


@pytest.mark.parametrize("loss", ["forward_kl", "reverse_kl", "jsd", "cakld"])
def test_only_plain_cross_entropy_needs_no_teacher(loss: str) -> None:
    assert LossConfig.model_validate({loss: 0.5}).needs_teacher
    assert not LossConfig(ce=1.0).needs_teacher
    assert LossConfig.model_validate({"ce": 1, "relation": {"weight": 60}}).needs_teacher


def test_stages_may_read_paths_of_their_own() -> None:
    config = check(tree(stages={"refine": None, "distill": {"sources": ["/a", {"path": "/b", "text_column": "t"}]}}))
    stage = config.stages["distill"]
    assert isinstance(stage, DistillStage)
    assert stage.sources == (SourceConfig(path="/a"), SourceConfig(path="/b", text_column="t"))


def test_the_defaults_alone_are_a_configuration() -> None:
    assert Config().stages == {}


def test_monitoring_is_checked_like_the_rest() -> None:
    assert check(tree(data="/corpus")).monitor.codes_every == 100
    with pytest.raises(ConfigError, match="codes_every"):
        check(tree(data="/corpus", monitor={"codes_every": -1}))
    with pytest.raises(ConfigError, match="gradients_every"):
        check(tree(data="/corpus", monitor={"gradient_every": 5}))
    texts = [{"name": "wiki", "path": "wiki.txt"}]
    assert check(tree(data="/corpus", monitor={"quality_every": 9, "quality_texts": texts})).monitor.quality_every == 9
    with pytest.raises(ConfigError, match=r"monitor\.quality_texts: given, and monitor\.quality_every is 0"):
        check(tree(data="/corpus", monitor={"quality_texts": texts}))


def test_a_teacher_is_given_part_of_a_gpu_or_whole_ones() -> None:
    assert [check(tree(teacher={"gpus": gpus})).teacher.gpus for gpus in (0.25, 1, 4)] == [0.25, 1, 4]
    with pytest.raises(ConfigError, match=r"teacher\.gpus: 1\.5: above 1 Ray gives whole GPUs only\. Give 1 or 2"):
        check(tree(teacher={"gpus": 1.5}))
