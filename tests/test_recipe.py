"""Recipes: every shipped one loads, plans offline and survives a round trip; a mistake is one line with a remedy."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from bitdistill_ray import recipe, train
from bitdistill_ray.config import Config
from bitdistill_ray.core import Format, Granularity
from bitdistill_ray.errors import ConfigError
from bitdistill_ray.losses.objective import GammaMode, TermKind
from bitdistill_ray.stage_config import DistillStage, FinetuneStage, PretrainStage, RefineStage, SourceConfig
from bitdistill_ray.storage import Storage
from bitdistill_ray.student.objective import objective_of
from tests.tiny_models import save_tiny

TEXTS = ("data=/corpus", "data.task={path: /task.jsonl, prompt_column: question, response_column: answer}")


def load_whole(name: str, *overrides: str) -> Config:
    """A shipped recipe with the texts that some of them leave to the user."""
    return recipe.load(name, [*TEXTS, *overrides])


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("teacher"), "llama")


def test_the_shipped_names() -> None:
    assert recipe.DEFAULT in recipe.names()
    assert {"bitdistiller-nf3", "bitdistiller-int3", "bitdistiller-int2", "bitdistill-ternary"} < set(recipe.names())


@pytest.mark.parametrize("name", recipe.names())
def test_a_shipped_recipe_survives_a_round_trip(name: str, tmp_path: Path) -> None:
    config = load_whole(name)
    (tmp_path / "config.yaml").write_text(recipe.dump(config), encoding="utf-8")
    assert recipe.load(str(tmp_path / "config.yaml")) == config
    text = (Path(recipe.__file__).parent / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    assert text.startswith("# "), "a recipe opens with what it does, on what, and how long"


@pytest.mark.parametrize("name", recipe.names())
def test_a_shipped_recipe_plans_offline_and_starts_nothing(
    name: str, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_whole(name)
    fitted = [f"model.teacher={teacher}", f"run={tmp_path / 'run'}"]
    if config.quant.granularity is Granularity.GROUP:
        fitted.append("quant.group_size=16")
    for key, stage in config.stages.items():
        if isinstance(stage, DistillStage | PretrainStage) and stage.loss.relation:
            fitted += [f"stages.{key}.loss.relation.heads=8", f"stages.{key}.loss.relation.layer=1"]
    assert train.main([name, *TEXTS, *fitted, "--plan"]) == 0
    printed = capsys.readouterr().out
    assert f"teacher: {teacher}" in printed
    assert "bits/weight" in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["bitdistill-ternary", "bitdistill-ternary-qwen3-4b"])
def test_a_recipe_for_a_task_names_the_texts_that_it_lacks(name: str) -> None:
    with pytest.raises(ConfigError, match="Set data=PATH"):
        recipe.load(name)
    with pytest.raises(ConfigError, match=r"stages\.finetune: .*Set data\.task=PATH"):
        recipe.load(name, ["data=/corpus"])


@pytest.mark.parametrize(
    ("name", "fmt", "kinds", "rate"),
    [
        ("bitdistiller-nf3", Format.NF3, {TermKind.FORWARD_KL}, 3e-4),
        ("bitdistiller-int3", Format.INT3, {TermKind.FORWARD_KL}, 4e-4),
        ("bitdistiller-int2", Format.INT2, {TermKind.FORWARD_KL}, 1e-3),
        ("bitdistill-ternary", Format.TERNARY, {TermKind.CE, TermKind.FORWARD_KL}, 3e-4),
    ],
)
def test_recipes_for_one_gpu_are_what_was_found_best(name: str, fmt: Format, kinds: set[str], rate: float) -> None:
    config = load_whole(name)
    stage = config.stages["distill"]
    assert isinstance(stage, DistillStage)
    assert config.quant.format is fmt
    assert {term.kind for term in objective_of(stage.loss).terms} == kinds
    assert stage.learning_rate == pytest.approx(rate)
    assert config.teacher.gpus + config.student.gpus <= 1


def test_the_papers_recipes_are_the_papers_settings() -> None:
    for name, fmt in (("bitdistiller-int2-llama2-7b", Format.INT2), ("bitdistiller-nf3-llama2-7b", Format.NF3)):
        config = load_whole(name)
        stage = config.stages["distill"]
        assert isinstance(stage, DistillStage)
        steps, rest = divmod(stage.tokens, stage.batch_sequences * config.data.sequence_length)
        found = (steps, rest, stage.batch_sequences, stage.learning_rate, stage.schedule, config.quant.format)
        assert found == (200, 0, 128, 8e-6, "constant", fmt)
        assert objective_of(stage.loss).scalar_gamma is GammaMode.MAX

    config = load_whole("bitdistill-ternary-qwen3-0.6b")
    refine, finetune, stage = (config.stages[name] for name in ("refine", "finetune", "distill"))
    assert isinstance(refine, RefineStage)
    assert isinstance(finetune, FinetuneStage)
    assert isinstance(stage, DistillStage)
    objective = objective_of(stage.loss)
    assert objective.relation is not None
    assert (objective.relation.weight, objective.relation.relation_heads, refine.subln) == (1e5, 32, "all")
    [kl] = [term for term in objective.terms if term.kind == TermKind.FORWARD_KL]
    assert (kl.weight, kl.temperature, kl.tau_squared) == (10, 5, True)


UNKNOWN = [
    ("modl.teacher=x", "modl", "model"),
    ("model.teachr=x", "model.teachr", "model.teacher"),
    ("quant.formats=nf3", "quant.formats", "quant.format"),
    ("data.source=/c", "data.source", "data.sources"),
    ("data.sources=[{path: a, text_colum: b}]", "data.sources.0.text_colum", "data.sources.0.text_column"),
    ("storage.endpoint=x", "storage.endpoint", "storage.endpoint_url"),
    ("teacher.actor=2", "teacher.actor", "teacher.actors"),
    ("student.microbatch=2", "student.microbatch", "student.micro_batch"),
    ("stages.distill.tokns=3", "stages.distill.tokns", "stages.distill.tokens"),
    ("stages.distill.loss.cakdl=1", "stages.distill.loss.cakdl", "stages.distill.loss.cakld"),
    (
        "stages.distill.loss.relation={weight: 1, laier: 2}",
        "stages.distill.loss.relation.laier",
        "stages.distill.loss.relation.layer",
    ),
    ("stages.evaluate.texts=[{name: a, pth: b}]", "stages.evaluate.texts.0.pth", "stages.evaluate.texts.0.path"),
    ("stages.write.temperatures=1", "stages.write.temperatures", "stages.write.temperature"),
]


@pytest.mark.parametrize(("override", "key", "nearest"), UNKNOWN, ids=[u[1] for u in UNKNOWN])
def test_an_unknown_key_names_the_nearest_known_one(override: str, key: str, nearest: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        recipe.load("demo", [override])
    assert refusal.value.where == key
    assert "unknown key" in refusal.value.what
    assert refusal.value.remedy == f"Did you mean {nearest!r}?"
    assert "\n" not in str(refusal.value)


def test_a_key_far_from_all_others_gets_the_list() -> None:
    with pytest.raises(ConfigError, match=r"stages\.clip\.qqqq: unknown key.*Known: calibration_sequences, exclude"):
        recipe.load("demo", ["stages.clip.qqqq=1"])


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("quant.format=int5", "quant.format: 'int5': input should be 'ternary', 'int2'"),
        ("stages.distill.tokens=abc", "stages.distill.tokens: 'abc': input should be a valid integer"),
        ("student.zero=5", "student.zero: 5: input should be 0, 1, 2 or 3"),
        ("stages.distil={}", "stages.distil: there is no stage of kind 'distil'. Did you mean 'distill'?"),
        ("stages.x={}", "stages.x: there is no stage of kind 'x'. Set its kind to one of refine, clip"),
        ("tokens", "tokens: not an override. Write KEY=VALUE"),
        ("seed=[1", "seed: '[1' is not a YAML value"),
        ("run.x=1", "run: 'runs/demo' has no keys of its own"),
    ],
)
def test_a_wrong_value_is_one_line(override: str, line: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        recipe.load("demo", [override])
    assert str(refusal.value).startswith(line)
    assert "\n" not in str(refusal.value)


def test_a_mistake_ends_the_command_with_2_and_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["demo", "model.teachr=x"]) == 2
    assert capsys.readouterr().err == ("error: model.teachr: unknown key (value 'x'). Did you mean 'model.teacher'?\n")


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("bitdistiler-nf3", "recipe: there is none called 'bitdistiler-nf3'. Did you mean 'bitdistiller-nf3'?"),
        ("zzz", "recipe: there is none called 'zzz'. Shipped: "),
    ],
)
def test_an_unknown_recipe_names_the_nearest(name: str, line: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        recipe.load(name)
    assert str(refusal.value).startswith(line)


@pytest.mark.parametrize(("text", "what"), [("a: [", "not YAML"), ("- a", "not a mapping")])
def test_a_file_that_is_no_recipe_is_refused(text: str, what: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=what):
        recipe.load(str(tmp_path / "r.yaml"))


def test_overrides_are_yaml_read_in_order() -> None:
    config = recipe.load(
        "demo",
        ["stages.distill.tokens=2e6", "stages.distill.learning_rate=1e-5", "seed=1", "seed=2", "teacher.threads="],
    )
    stage = config.stages["distill"]
    assert isinstance(stage, DistillStage)
    assert (stage.tokens, stage.learning_rate, config.seed, config.teacher.threads) == (2_000_000, 1e-5, 2, None)


def test_an_override_of_a_section_changes_the_keys_it_names() -> None:
    config = recipe.load("demo", ["stages.distill={tokens: 7}", "stages.clip=false"])
    shipped = recipe.load("demo").stages["distill"]
    assert config.stages["distill"] == shipped.model_copy(update={"tokens": 7})
    assert "clip" not in config.stages


@pytest.mark.parametrize("value", ["s3://bucket/corpus", "[s3://bucket/corpus]"])
def test_the_data_shorthand_changes_the_corpus_and_nothing_else(value: str) -> None:
    before, after = recipe.load("demo").data, recipe.load("demo", [f"data={value}"]).data
    assert after == before.model_copy(update={"sources": (SourceConfig(path="s3://bucket/corpus"),)})


def test_a_recipe_is_read_from_object_storage(
    s3_bucket: str, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    tree = {"run": "runs/mine", "stages": {"write": None, "refine": None, "distill": {"tokens": 9}}}
    Storage(s3_bucket).write_bytes("recipes/mine.yaml", yaml.safe_dump(tree, sort_keys=False).encode())
    assert recipe.load(f"{s3_bucket}/recipes/mine.yaml").run == "runs/mine"
