"""Plans go through JSON unchanged, wrong ones are refused, and no bytes at all break the reader."""

import json
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from eckart.errors import EckartError, PlanError
from eckart.plan import Edit, MadeBy, Plan, PlannedModel, read_plan, write_plan

files = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
words = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12)
numbers = st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
settings_tree = st.dictionaries(
    words,
    st.recursive(
        st.none() | st.booleans() | numbers | words,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
        max_leaves=5,
    ),
    max_size=3,
)


@st.composite
def edits(draw):
    shape = draw(st.tuples(st.integers(1, 10**6), st.integers(1, 10**6)))
    kind = draw(st.sampled_from(["low_rank", "zero", "magnitude", "shrink"]))
    svd = "exact" if kind == "shrink" else draw(st.sampled_from(["exact", "lowrank"]))
    basis = "top" if svd == "lowrank" or kind == "shrink" else draw(st.sampled_from(["top", "bottom", "random"]))
    plain = (kind, svd, basis) == ("low_rank", "exact", "top")
    blocks = draw(st.integers(1, shape[0])) if plain else 1
    even = blocks > 1 and shape[0] % blocks == 0
    ways = ["contiguous", *(["subspaces"] if blocks > 1 else []), *(["heads"] if even else [])]
    return Edit(
        matrix=draw(words),
        layer=draw(st.none() | st.integers(0, 200)),
        type=draw(words),
        shape=shape,
        kind=kind,
        rho=0.0 if kind == "zero" else draw(st.floats(0, 1, exclude_min=True)),
        rank=0 if kind == "zero" else draw(st.integers(1, min(math.ceil(shape[0] / blocks), shape[1]))),
        basis=basis,
        blocks=blocks,
        clustering=draw(st.sampled_from(ways)),
        svd=svd,
        niter=draw(st.integers(0, 100)),
        rank_rule=draw(st.none() | words),
        noise=draw(st.floats(0, exclude_min=True, allow_infinity=False)) if kind == "shrink" else None,
        seed=draw(st.integers(0, 2**31 - 1)),
        stack=draw(words),
    )


plans = st.builds(
    Plan,
    model=st.builds(PlannedModel, source=words, architecture=words, weights_sha256=words),
    edits=st.lists(edits(), max_size=4, unique_by=lambda edit: edit.matrix).map(tuple),
    made_by=st.builds(MadeBy, eckart=words, recipe=settings_tree),
)
GOOD = {
    "schema_version": 1,
    "model": {"source": "m", "architecture": "Llama", "weights_sha256": "0" * 64},
    "edits": [{"matrix": "a", "layer": 0, "type": "fc_in", "shape": [6, 4], "rho": 0.5, "rank": 2}],
    "made_by": {"eckart": "0.1.0"},
}


@files
@given(plan=plans)
def test_a_plan_goes_through_json_unchanged(plan, tmp_path):
    path = tmp_path / "plan.json"
    write_plan(path, plan)
    assert read_plan(path) == plan
    assert read_plan(tmp_path) == plan
    # Plain JSON, so that other programs read it.
    plain = json.loads(path.read_text(encoding="utf-8"))
    assert plain["schema_version"] == 1
    assert [edit["rho"] for edit in plain["edits"]] == [edit.rho for edit in plan.edits]


@files
@given(content=st.binary(max_size=200))
def test_any_bytes_are_a_plan_or_an_error_that_names_the_file(content, tmp_path):
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(EckartError, match="plan.json"):
        read_plan(path)


@files
@given(data=st.data())
def test_a_mutated_plan_is_a_plan_or_an_error(data, may_refuse, tmp_path):
    text = bytearray(json.dumps(GOOD).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "plan.json"
    path.write_bytes(text)
    with may_refuse(EckartError, "plan.json"):
        write_plan(tmp_path / "again.json", read_plan(path))


values = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.lists(st.integers())


@files
@given(field=st.sampled_from([*Edit.model_fields, "more"]), value=values)
def test_an_edit_with_any_value_is_a_plan_or_a_plan_error(field, value, may_refuse, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(GOOD | {"edits": [GOOD["edits"][0] | {field: value}]}))
    with may_refuse(PlanError, "plan.json"):
        write_plan(tmp_path / "again.json", read_plan(path))


@pytest.mark.parametrize(
    "fields",
    [
        {"rank": 0},
        {"rank": 5},
        {"rank": -1},
        {"rho": 0},
        {"rho": 1.01},
        {"shape": [0, 4]},
        {"shape": [-6, -4]},
        {"shape": [6]},
        {"kind": "zero"},
        {"kind": "zero", "rank": 0, "rho": 0.5, "seed": -1},
        {"blocks": 0},
        {"blocks": 7, "rank": 1},
        {"blocks": 4, "rank": 3},
        {"blocks": 2, "kind": "magnitude"},
        {"blocks": 2, "kind": "zero", "rank": 0},
        {"blocks": 2, "basis": "bottom"},
        {"blocks": 2, "svd": "lowrank"},
        {"blocks": 4, "rank": 1, "clustering": "heads"},
        {"clustering": "subspaces"},
        {"clustering": "heads"},
        {"blocks": 2, "clustering": "kmeans"},
        {"weighting": "fisher"},
        {"svd": "lowrank", "basis": "random"},
        {"kind": "shrink"},
        {"kind": "shrink", "noise": 0.0},
        {"kind": "shrink", "noise": math.inf},
        {"kind": "shrink", "noise": 1.0, "basis": "random"},
        {"kind": "shrink", "noise": 1.0, "blocks": 2},
        {"noise": 1.0},
        {"more": 1},
    ],
)
def test_an_edit_that_contradicts_itself_is_refused(fields):
    Edit.model_validate(GOOD["edits"][0])
    with pytest.raises(ValidationError):
        Edit.model_validate(GOOD["edits"][0] | fields)


def test_a_plan_cannot_be_changed():
    plan = Plan.model_validate(GOOD)
    with pytest.raises(ValidationError):
        plan.edits[0].rank = 1


def test_a_missing_plan_says_what_a_plan_is(tmp_path):
    for path in (tmp_path, tmp_path / "none.json"):
        with pytest.raises(PlanError, match="does not exist.*written by eckart search"):
            read_plan(path)


def test_a_plan_from_before_there_were_blocks_is_read_as_one_block(tmp_path):
    path = tmp_path / "plan.json"
    old = GOOD["edits"][0] | {"kind": "low_rank", "weighting": "none", "basis": "top", "blocks": 1, "svd": "exact"}
    for edit in (GOOD["edits"][0], old):
        path.write_text(json.dumps(GOOD | {"edits": [edit]}))
        (found,) = read_plan(path).edits
        assert (found.blocks, found.clustering, found.full_rank) == (1, "contiguous", 4)


@given(edit=edits())
def test_the_full_rank_is_that_of_the_largest_of_even_blocks(edit):
    out, into = edit.shape
    largest = out // edit.blocks + (out % edit.blocks > 0)
    assert edit.full_rank == min(largest, into)
