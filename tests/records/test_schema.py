"""What a stored study promises is checked where it is read: fields, arrays, sizes and time."""

import os
import time
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from records.helpers import a_spec, kept_trees, same, some_blocks

import playbook_optax as pbx
from playbook_optax.records import checkpoints, schema, storage, weights
from playbook_optax.runner import finished, resume
from playbook_optax.search_space import Categorical, Float, SearchSpace

BIG = 2**31


def stored(directory, spec=None, blocks=None):
    """A study directory of any spec and blocks, each bound to the other."""
    spec = a_spec(4) if spec is None else spec
    storage.write_spec(directory, spec)
    for index, block in enumerate(some_blocks(4) if blocks is None else blocks):
        storage.write_block(directory, index, block, storage.owner_of(spec))
    return directory


def changed(**fields):
    return {**a_spec(4), **fields}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"objective": 3}, "'objective' must be text"),
        ({"maximize": 1}, "'maximize' must be true or false"),
        ({"num_trials": True}, "'num_trials' must be an integer"),
        ({"num_trials": BIG}, "'num_trials' must be an integer"),
        ({"num_trials": float("inf")}, "'num_trials' must be an integer"),
        ({"num_seeds": 0}, "'num_seeds' must be an integer from 1"),
        ({"num_steps": 10**400}, "'num_steps' must be an integer"),
        ({"num_steps": 15}, "'step' ends at 20, after 'num_steps' = 15"),
        ({"eval_every": 0.5}, "'eval_every' must be an integer"),
        ({"step": []}, "'step' must be a list of rising integers"),
        ({"step": [0, 10, 10]}, "'step' must be a list of rising integers"),
        ({"step": [0, 10.0, 20]}, "'step' must be a list of rising integers"),
        ({"step": [0, 10, BIG]}, "'step' must be a list of rising integers"),
        ({"keep": "all"}, "'keep' must be one of none, best, final"),
        ({"independent": "no"}, "'independent' must be true or false"),
        ({"trials_per_block": 10**9 * 3}, "'trials_per_block' must be an integer"),
        ({"planned_trials": 3}, "'planned_trials' is below 'num_trials'"),
        ({"key": {"impl": None, "data": [-1]}}, "'key' must be impl"),
        ({"key": [0, 1]}, "'key' must be impl"),
        ({"space": []}, "'space' must be a search space"),
        ({"space": {"parameters": [{"name": "x"}]}}, "'space' is no search space: .*lacks 'kind'"),
        ({"labels": ["a"]}, "'labels' must be lists of texts"),
        ({"labels": {"decay": ["a", "b"]}}, "'labels' has 'decay', whose choices 'space' tells"),
        ({"labels": {"kind": []}}, "'labels' must be lists of texts"),
        ({"points": {"a": [1.0], "b": [1.0, 2.0]}}, "'points' must be lists of finite numbers"),
        ({"points": {"a": [float("nan")]}}, "'points' must be lists of finite numbers"),
        (
            {"points": {"a": [1.0]}, "dtypes": {"a": "float32"}},
            r"points\['a'\] has 1 entries, 'num_trials' is 4",
        ),
        ({"points": {"a": [1.0] * 4}}, "'dtypes' lacks 'a'"),
        ({"dtypes": {"a": "object"}}, "'dtypes' must be dtypes by name"),
        ({"norm_edges": [1.0, 0.0]}, "'norm_edges' must be a list of at least two rising numbers"),
        ({"trees": {"params": [["leaf", ["a"]]]}}, "'trees': .* leaf with children"),
        ({"trees": {"opt_state": []}}, "'trees' must be descriptions"),
        ({"fixed": {"clip": 2**64}}, "'fixed' must be numbers by name"),
        ({"versions": "0.1"}, "'versions' must be texts by name"),
        ({"unchecked": ["high_loss"]}, "'unchecked' must be texts by name"),
        ({"trial_ids": [1]}, "trial_ids has 1 entries"),
        ({"member": {"label": "a"}}, "'member' must be scientific and label"),
        ({"arrays": {"trial": ["int32"]}}, "'arrays' must be a dtype and the shape"),
        ({"arrays": {"trial": ["int32", []]}}, "the array 'seed' is missing"),
        ({"arrays": {"other": ["int32", []]}}, "the array 'other' is none that a block has"),
    ],
)
def test_a_field_that_no_writer_writes_is_named(tmp_path, fields, message):
    stored(tmp_path, changed(**fields))
    with pytest.raises(storage.CorruptSpec, match=rf"study\.json.*{message}"):
        pbx.load_study(tmp_path)


@pytest.mark.parametrize("name", ["objective", "maximize", "num_trials", "step", "num_steps"])
def test_a_field_that_is_missing_is_named(tmp_path, name):
    spec = a_spec(4)
    del spec[name]
    stored(tmp_path, spec)
    with pytest.raises(storage.CorruptSpec, match=f"lacks '{name}'"):
        pbx.load_study(tmp_path)


def without(block, name):
    return {n: array for n, array in block.items() if n != name}


def filled(block, name, value, dtype=None):
    array = block[name].astype(dtype or block[name].dtype)
    array[1] = value
    return {**block, name: array}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: without(b, "point/decay"), "the array 'point/decay' is missing"),
        (lambda b: without(b, "metrics/valid/loss"), "the array 'metrics/valid/loss' is missing"),
        (lambda b: {**b, "other": b["trial"]}, "the array 'other' is none that a block has"),
        (lambda b: {**b, "params/w": b["trial"]}, "none of the weights"),
        (lambda b: filled(b, "infeasible", 2, np.int8), "'infeasible' must hold booleans"),
        (lambda b: filled(b, "trial", 1, bool), "'trial' must hold integers, its dtype is bool"),
        (lambda b: filled(b, "seed", 0, np.float32), "'seed' must hold integers"),
        (lambda b: filled(b, "metrics/valid/loss", 1, complex), "must hold real numbers"),
        (lambda b: {**b, "metrics/valid/loss": b["best_value"]}, r"has the shape \(\) per run"),
        (lambda b: {**b, "norms/counts": b["norms/counts"][:, :2]}, r"\(2,\) per run, expected"),
        (lambda b: {n: a[:2] for n, a in b.items()}, "declares 2 runs, the study has blocks of 3"),
        (lambda b: {**b, "seed": b["seed"][:2]}, "the others have 3 runs"),
        (lambda b: filled(b, "trial", -1), "'trial' has numbers that are not in 0 to"),
        (lambda b: filled(b, "trial", 2**63, np.uint64), "'trial' has numbers that are not in"),
        (lambda b: filled(b, "seed", 1), "'seed' has numbers that are not in 0 to 0"),
        (lambda b: filled(b, "infeasible_reason", 99), "'infeasible_reason' has numbers"),
        (lambda b: filled(b, "infeasible_step", -2), "'infeasible_step' has numbers"),
        (lambda b: filled(b, "best_step", 21), "'best_step' has numbers that are not in -1 to 20"),
        (lambda b: filled(b, "norms/counts", -1), "'norms/counts' has numbers"),
        (lambda b: filled(b, "point/decay", 2), "'point/decay' is 2 .* choices are 0 to 1"),
        (lambda b: filled(b, "point/decay", 1, np.float32), "'point/decay' must hold indices"),
        (lambda b: filled(b, "point/decay", 1, bool), "'point/decay' must hold indices"),
        (lambda b: filled(b, "point/learning_rate", np.nan), "'point/learning_rate' is not finite"),
        (lambda b: filled(b, "point/learning_rate", -1), "which the scale 'log'"),
    ],
)
def test_an_array_that_no_block_has_is_named(tmp_path, change, message):
    blocks = some_blocks(4)
    stored(tmp_path, blocks=[blocks[0], change(blocks[1])])
    with pytest.raises(storage.CorruptBlock, match=f"(?i)block.*{message}"):
        pbx.load_study(tmp_path)
    blocks = [change(block) for block in blocks]  # The same in all of them is no better.
    stored(tmp_path / "all", blocks=blocks)
    with pytest.raises(storage.CorruptBlock, match=message):
        pbx.load_study(tmp_path / "all")


def test_the_layout_that_a_spec_records_holds_exactly(tmp_path):
    blocks = some_blocks(4, kept=True)
    layout = storage.describe_arrays(blocks[0])
    spec = changed(arrays=layout, trees=kept_trees(), keep="best")
    assert pbx.load_study(stored(tmp_path / "whole", spec, blocks)).num_trials == 4
    wide = {**blocks[0], "params/low": np.zeros((3, 4), ml_dtypes.bfloat16)}
    double = {**blocks[0], "best_value": blocks[0]["best_value"].astype(np.float64)}
    for number, block in enumerate((wide, double, without(blocks[0], "norms/max"))):
        stored(tmp_path / str(number), spec, [block, blocks[1]])
        with pytest.raises(storage.CorruptBlock, match=r"'arrays' says|is missing"):
            pbx.load_study(tmp_path / str(number))


def test_a_block_that_is_not_of_the_layout_is_trained_again(tmp_path):
    spec, blocks = a_spec(4), some_blocks(4)
    stored(tmp_path, spec, [blocks[0], filled(blocks[1], "infeasible_reason", 99)])
    read = schema.block_reader(tmp_path, schema.read_spec(tmp_path))
    assert same(read(0), blocks[0])
    with pytest.raises(storage.CorruptBlock):
        read(1)


# Sizes --------------------------------------------------------------------------------------------


def sparse(path, rows, columns=3):
    """A block's file of such a shape as far as its header goes, without data."""
    block = {n: np.broadcast_to(a[:1], (rows, *a.shape[1:])) for n, a in some_blocks(1)[0].items()}
    block["metrics/valid/loss"] = np.broadcast_to(np.float32(0), (rows, columns))
    header = storage._block_header(0, block, storage.study_identity(a_spec(4)))
    end = 0
    for array in block.values():
        end = storage._aligned(end) + array.nbytes
    path.unlink()
    with open(path, "wb") as file:
        file.write(storage._PRELUDE.pack(storage._MAGIC, len(header)) + header)
        file.truncate(storage._PRELUDE.size + len(header) + end + 32)


@pytest.mark.parametrize("shape", [(3, 10**9), (10**9, 3), (3, 25 * 10**9)])
def test_a_sparse_block_is_refused_unread(tmp_path, shape):
    stored(tmp_path)
    path = tmp_path / "blocks" / "block-00000000.pbx"
    sparse(path, *shape)
    assert path.stat().st_size > 10**10
    tracemalloc.start()
    began = time.monotonic()
    try:
        with pytest.raises(storage.CorruptBlock, match=r"metrics/valid/loss|runs"):
            pbx.load_study(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()
    assert time.monotonic() - began < 2


def test_a_block_that_memory_cannot_hold_is_our_error(tmp_path, monkeypatch):
    stored(tmp_path)
    real = storage._read_block_file

    def full(*args):
        raise MemoryError

    monkeypatch.setattr(storage, "_read_block_file", full)
    with pytest.raises(storage.StorageError, match="does not fit into memory"):
        pbx.load_study(tmp_path)
    monkeypatch.setattr(storage, "_read_block_file", real)
    assert pbx.load_study(tmp_path).num_trials == 4


def test_a_newer_block_of_any_size_is_not_read(tmp_path):
    stored(tmp_path)
    path = tmp_path / "blocks" / "block-00000000.pbx"
    header = b'{"format": 99, "index": 0}'
    with open(path, "wb") as file:
        file.write(storage._PRELUDE.pack(storage._MAGIC, len(header)) + header)
        file.truncate(10**11)
    began = time.monotonic()
    with pytest.raises(storage.NewerFormat, match="format 99"):
        pbx.load_study(tmp_path)
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("num_seeds", [1, 2, BIG - 1])
def test_a_study_of_two_billion_trials_takes_no_memory(tmp_path, num_seeds):
    stored(tmp_path, changed(num_trials=BIG - 1, num_seeds=num_seeds), [])
    tracemalloc.start()
    try:
        study = pbx.load_study(tmp_path)
        assert study.num_trials == 0
        assert study.spec["planned_trials"] == BIG - 1
        assert len(study.to_dataframe()) == 0
        assert pbx.diagnose(study)[0].code == "no_trials"
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "text",
    ['"\\' * 40_000, '"' * 80_000, '"' + '\\"' * 40_000, "[]," * 10**6, '"' + "x" * 10**6 + '"'],
    ids=["escapes", "quotes", "unfinished", "lists", "honest"],
)
def test_the_depth_of_json_is_found_in_linear_time(text):
    began = time.monotonic()
    if text.startswith("[]"):
        with pytest.raises(ValueError, match="lists and objects"):
            storage._check_depth(text + text)
    else:
        storage._check_depth(text)
    assert time.monotonic() - began < 3


def test_lists_without_end_are_refused_before_they_are_made(tmp_path):
    text = '",\n "schema_version": 1, "a": [' + "[]," * storage._MAX_JSON_CONTAINERS + "[]]}"
    (tmp_path / "study.json").write_text('{\n "sha256": "' + "0" * 64 + text)
    with pytest.raises(storage.CorruptSpec, match="lists and objects"):
        storage.read_spec(tmp_path)


def test_a_long_text_is_read_with_little_memory(tmp_path):
    text = "x" * (8 * 2**20)
    storage.write_spec(tmp_path, {"text": text})
    tracemalloc.start()
    try:
        assert storage.read_spec(tmp_path)["text"] == text
        assert tracemalloc.get_traced_memory()[1] < 6 * len(text)
    finally:
        tracemalloc.stop()


def test_what_cannot_be_opened_is_our_error(tmp_path):
    stored(tmp_path)
    path = tmp_path / "study.json"
    path.unlink()
    path.symlink_to("study.json")
    with pytest.raises(storage.CorruptSpec, match="Too many levels of symbolic links"):
        pbx.load_study(tmp_path)
    other = stored(tmp_path / "other")
    os.rename(other / "blocks", other / "kept")
    (other / "blocks").symlink_to("blocks")
    with pytest.raises(storage.StorageError, match=r"blocks.*Too many levels of symbolic links"):
        pbx.load_study(other)


# Weights, saves and sets --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "description",
    [
        None,
        [],
        [["leaf", []], ["leaf", []]],
        [["dict", ["a"]]],
        [["dict", [["a"]]]],
        [["other", []]],
        [["dict"]],
        ["leaf"],
        [["list", [0]]] * 10_000 + [["leaf", []]],
        [["dict", ["a" * 10**6]], ["dict", [str(i) for i in range(100)]], *[["leaf", []]] * 100],
    ],
)
def test_descriptions_of_weights_that_cannot_be_are_refused(description):
    with pytest.raises(ValueError, match="the description of the weights"):
        weights.leaf_paths(description)


@pytest.mark.parametrize("step", [True, 10.0, 11, -10, 10**9, "10", None])
def test_a_save_of_an_impossible_step_is_passed_over(tmp_path, step):
    like = [np.zeros((2, 3), np.float32)]
    saves = checkpoints.Checkpoints(tmp_path, resume._name([0]))
    for number in (5, 10):
        saves.write(number, [one + number for one in like], {"blocks": [0], "position": None})
    save = tmp_path / "checkpoints" / resume._name([0]) / "step-00000010"
    manifest = storage.read_document(save / "manifest.json")
    storage.write_document(save / "manifest.json", {**manifest, "step": step})
    keeper = resume.Keeper(None, finished.Store(tmp_path, storage.NOBODY, None))
    found = keeper.load((0,), like, 20)
    assert found.step == 5
    assert (found.arrays[0] == 5).all()
    save.rename(save.with_name("step-00000099"))
    storage.write_document(
        save.with_name("step-00000099") / "manifest.json", manifest | {"step": 99}
    )
    assert keeper.load((0,), like, 20).step == 5  # A run of 20 steps has none at 99.


@pytest.mark.parametrize("blocks", [None, 3, ["0"], [0, 0], [0.0], [[0]], {"0": 1}])
def test_a_save_of_impossible_blocks_is_of_none(blocks):
    assert resume._blocks({"blocks": blocks}) == ()
    assert resume._blocks({"blocks": [2, 1]}) == (2, 1)


def test_the_index_of_a_set_holds_numbers_that_arrays_hold(tmp_path):
    study = pbx.Study.from_arrays({"lr": [0.1]}, {"loss": [[1.0]]}, [0], objective="loss")
    pbx.StudySet({"adam": study}, "optimizer", {"adam": {"eps": 1e-8}}).save(tmp_path)
    index = storage.read_document(tmp_path / "studies.json")
    for change in ({"fixed": [{"eps": 10**30}]}, {"scientific": ""}, {"scientific": "x" * 999}):
        storage.write_document(tmp_path / "studies.json", {**index, **change})
        with pytest.raises(storage.CorruptSpec, match="not the index of a set"):
            pbx.load_study_set(tmp_path)


def test_a_record_from_elsewhere_is_not_trained_on(tmp_path):
    study = pbx.Study.from_arrays({"lr": [0.1]}, {"loss": [[1.0]]}, [10], objective="loss")
    study.save(tmp_path)
    with pytest.raises(ValueError, match="it lacks 'eval_every'"):
        schema.check_trainable(schema.read_spec(tmp_path))


# Records made in memory ---------------------------------------------------------------------------


def test_what_a_study_is_made_of_is_checked_as_what_is_read():
    space = SearchSpace(
        {"rate": Float(0.1, 0.9, scale="reverse_log"), "decay": Categorical(["a", "b"])}
    )
    good = {"rate": [0.5, 0.8], "decay": [0, 1]}

    def study(**points):
        curves = {"loss": [[2.0, 1.0], [2.0, 1.5]]}
        return pbx.Study.from_arrays(
            {**good, **points}, curves, [0, 9], objective="loss", space=space
        )

    assert study().to_dataframe()["decay"].tolist() == ["a", "b"]
    with pytest.raises(ValueError, match="choices are 0 to 1"):
        study(decay=[0, 2])
    with pytest.raises(ValueError, match="must hold indices"):
        study(decay=[0.0, 1.0])
    with pytest.raises(ValueError, match="scale 'reverse_log'"):
        study(rate=[0.5, 1.0])
    with pytest.raises(ValueError, match="not booleans"):
        study(rate=[False, True])


def test_long_labels_take_room_once(tmp_path):
    spec = changed(space=None, labels={"decay": ["x" * 10**6, "y"]}, source="from_dataframe")
    tracemalloc.start()
    try:
        study = pbx.load_study(stored(tmp_path, spec))
        assert study.points["decay"].tolist()[1] == "y"
        assert study.point(1)["decay"].item() == "y"
        assert tracemalloc.get_traced_memory()[1] < 3 * 10**7
    finally:
        tracemalloc.stop()
