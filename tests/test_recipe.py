"""Recipes make the same settings again, and no text at all breaks the reader."""

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eckart.errors import RecipeError
from eckart.recipe import CompressSettings, RecoverSettings, SearchSettings, Settings, make_settings, write_recipe

files = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
scoring = {
    "seed": st.integers(0, 2**31 - 1),
    "normalize": st.sampled_from(["none", "tokens"]),
    "batch_tokens": st.integers(1, 10**6),
    "overlong": st.sampled_from(["error", "truncate"]),
    "window": st.none() | st.integers(2, 10**5),
    "stride": st.none() | st.integers(1, 10**5),
}
TYPES = [
    "q_proj",
    "k_proj",
    "v_proj",
    "qkv_proj",
    "out_proj",
    "fc_in",
    "fc_up",
    "fc_out",
    "other",
    "attn",
    "mlp",
    "all",
]
searching = scoring | {
    "types": st.lists(st.sampled_from(TYPES), min_size=1).map(tuple),
    "layers": st.none() | st.lists(st.integers(-100, 100), min_size=1).map(tuple),
    "rho": st.lists(st.floats(0, 1, exclude_min=True), min_size=1).map(tuple),
    "kind": st.sampled_from(["low_rank", "zero", "magnitude"]),
    "basis": st.sampled_from(["top", "bottom", "random"]),
    "niter": st.integers(0, 100),
    "split": st.floats(0, 1, exclude_min=True, exclude_max=True),
    "shuffle": st.booleans(),
    "examples": st.none() | st.integers(1, 10**6),
}


@files
@given(made=st.builds(Settings, **scoring) | st.builds(SearchSettings, **searching))
def test_a_recipe_makes_the_same_settings_again(made, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(write_recipe(made), encoding="utf-8")
    assert make_settings(type(made), {}, path) == made


@files
@given(given_by_hand=st.fixed_dictionaries({}, optional=searching))
def test_what_is_given_by_hand_wins_and_none_is_not_given(given_by_hand, tmp_path):
    path = tmp_path / "recipe.yaml"
    in_file = {"rho": [0.3], "seed": 7, "split": 0.5, "window": 9, "types": ["mlp"]}
    path.write_text(yaml.safe_dump(in_file))
    made = make_settings(SearchSettings, given_by_hand, path).model_dump(mode="json")
    for name, default in SearchSettings().model_dump(mode="json").items():
        expected = given_by_hand.get(name)
        expected = in_file.get(name, default) if expected is None else expected
        assert made[name] == (list(expected) if isinstance(expected, tuple) else expected)


@files
@given(
    text=st.text(st.characters(codec="utf-8"), max_size=80) | st.text("[]{}:,-?!&*|>'\"%@`# \n\t01ae.~", max_size=40)
)
def test_any_text_is_a_recipe_or_a_recipe_error(text, may_refuse, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    with may_refuse(RecipeError, "ecipe"):
        make_settings(SearchSettings, {}, path)


@files
@given(content=st.binary(max_size=60))
def test_any_bytes_are_a_recipe_or_a_recipe_error(content, may_refuse, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with may_refuse(RecipeError, "ecipe"):
        make_settings(SearchSettings, {}, path)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@given(name=st.sampled_from([*SearchSettings.model_fields, "more"]), value=values)
def test_any_value_of_a_setting_is_taken_or_refused_by_name(name, value, may_refuse):
    with may_refuse(RecipeError, name, "Settings are"):
        make_settings(SearchSettings, {name: value})


@pytest.mark.parametrize(
    "tag", ["!!int x", "!!int ''", "!!float x", "!!timestamp x", "!!binary x", "2001-99-99", "0b_"]
)
def test_what_yaml_itself_cannot_make_is_a_recipe_error(tag, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"seed: {tag}\n")
    with pytest.raises(RecipeError):
        make_settings(SearchSettings, {}, path)


def test_a_recipe_that_grows_when_read_is_refused_with_a_short_message(tmp_path):
    path = tmp_path / "recipe.yaml"
    lines = ["a: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"b{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    path.write_text("\n".join([*lines, "rho: *a11"]))
    with pytest.raises(RecipeError) as caught:
        make_settings(SearchSettings, {}, path)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n"])
def test_an_empty_recipe_changes_nothing(text, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert make_settings(SearchSettings, {}, path) == SearchSettings()


@pytest.mark.parametrize("text", ["[]", "false", "0", "''"])
def test_a_recipe_that_is_no_mapping_is_refused_even_if_it_is_empty(text, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match="recipe.yaml"):
        make_settings(SearchSettings, {}, path)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"blocks": [2], "kind": "zero"}, "whole matrices"),
        ({"blocks": [1, 2], "kind": "magnitude"}, "whole matrices"),
        ({"blocks": [2], "basis": "random"}, "whole matrices"),
        ({"blocks": [2], "svd": "lowrank"}, "whole matrices"),
        ({"clustering": "heads", "basis": "bottom"}, "whole matrices"),
        ({"clustering": "heads", "blocks": [2]}, "leave 'blocks' out"),
        ({"clustering": "subspaces"}, "above 1"),
        ({"blocks": [0]}, "greater than or equal to 1"),
        ({"blocks": []}, "at least 1 item"),
    ],
)
def test_blocks_that_cannot_be_cut_are_refused(settings, reason):
    with pytest.raises(RecipeError, match=reason):
        make_settings(SearchSettings, settings)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"rank_rule": ["best"]}, "no rank rule 'best'.*rules are mp, tw"),
        ({"rank_rule": []}, "at least 1 item"),
        ({"kind": "shrink"}, "needs 'rank_rule'"),
        ({"kind": "shrink", "rank_rule": ["energy"]}, "for kind 'shrink'"),
        ({"kind": "shrink", "rank_rule": ["mp"], "basis": "bottom"}, "no basis but 'top'"),
        ({"kind": "zero", "rank_rule": ["mp"]}, "goes with kind 'low_rank' or 'shrink'"),
        ({"svd": "lowrank", "rank_rule": ["mp"]}, "svd 'exact'"),
        ({"blocks": [2], "rank_rule": ["mp"]}, "whole matrices"),
        ({"strategy": "laserrmt", "compose": 2}, "adds edits by itself"),
        ({"strategy": "laserrmt", "confidence": 0.9}, "adds edits by itself"),
        ({"strategy": "laserrmt", "kind": "zero"}, "by their noise"),
        ({"strategy": "laserrmt", "blocks": [2]}, "by their noise"),
    ],
)
def test_rules_and_loops_that_mean_nothing_are_refused(settings, reason):
    with pytest.raises(RecipeError, match=reason):
        make_settings(SearchSettings, settings)


@pytest.mark.parametrize("given", [{"blocks": (1, 4)}, {"blocks": (2,), "clustering": "subspaces"}, {"guard": "none"}])
def test_a_recipe_keeps_blocks_and_guard(given, tmp_path):
    made = SearchSettings(**given)
    path = tmp_path / "recipe.yaml"
    path.write_text(write_recipe(made), encoding="utf-8")
    assert make_settings(SearchSettings, {}, path) == made != SearchSettings()


def test_each_verb_reads_its_own_section_of_a_recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("compress: {ratio: 0.5}\nrecover: {steps: 7, lr: 0.25}\n")
    assert make_settings(CompressSettings, {}, path) == CompressSettings(ratio=0.5)
    assert make_settings(RecoverSettings, {"lr": 0.5}, path) == RecoverSettings(steps=7, lr=0.5)
    with pytest.raises(RecipeError, match="no settings for search"):
        make_settings(SearchSettings, {}, path)


@pytest.mark.parametrize("text", ["recover: 3", "recover:", "compress: {ratio: 0.5}"])
def test_a_section_without_settings_is_refused(text, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match="no settings for recover"):
        make_settings(RecoverSettings, {}, path)


def test_settings_of_a_recovery_fit_together():
    with pytest.raises(RecipeError, match="goes with method 'lora'"):
        make_settings(RecoverSettings, {"adapter": True})
    made = RecoverSettings(method="lora", adapter=True, minutes=2.5)
    assert RecoverSettings.model_validate(yaml.safe_load(write_recipe(made))) == made


def test_settings_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        SearchSettings().seed = 1
