"""Every message that names a command of this package stands in REGISTER, with the test that does what it advises."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tests.conftest import REPO

_COMMAND = re.compile(r"hpc-neuro [a-z{]|python -m launch\b")
_HERE = "tests/faults/test_advice_commands.py"
_DEMO = "tests/faults/test_advice.py::test_advice_is_obeyed_and_works"
_TREES = "tests/faults/test_advice_tools.py::test_advice_on_trees"
_TEACHERS = "tests/teacher/test_advice.py"
_FETCHED = "tests/test_fetch_teacher.py::test_where_there_is_no_internet_the_advice_is_obeyed"
_STUDY = "tests/faults/test_advice_tools.py::test_a_study_is_started_and_a_torn_trial_is_made_again"
_OTHER_CACHE = f"{_HERE}::test_a_cache_of_another_form_is_built_elsewhere"
_LACKING_CACHE = f"{_HERE}::test_a_cache_that_lacks_something_is_built_elsewhere"
_NO_ADVICE = "no advice"
"""Usage, help, prefixes of messages, and notes on pages."""
_SAME_COMMAND = (
    "tests/faults/test_kill_verbs.py::test_killed_verbs_and_second_processes_leave_the_results_of_quiet_runs"
)

REGISTER: dict[str, str] = {
    "hpc_neuro/cli.py::main": _NO_ADVICE,
    "hpc_neuro/cli.py::_refuse_verb": _NO_ADVICE,
    "hpc_neuro/cli.py::format_help": _NO_ADVICE,
    "hpc_neuro/cli.py::_report_fault": "tests/faults/test_unusable_places.py",
    "hpc_neuro/core/constants.py::": _SAME_COMMAND,
    "hpc_neuro/core/run_folder.py::require_unchanged": _DEMO,
    "hpc_neuro/data/feature_cache/encoding.py::load_codings": (
        f"{_HERE}::test_an_unreadable_coding_is_removed_with_its_cache"
    ),
    "hpc_neuro/data/feature_cache/manifest.py::read_manifest": _OTHER_CACHE,
    "hpc_neuro/data/feature_cache/manifest.py::record_use": _NO_ADVICE,
    "hpc_neuro/data/feature_cache/reader.py::__init__": _DEMO,
    "hpc_neuro/data/feature_cache/reader.py::_read_codings": (
        f"{_HERE}::test_a_lost_coding_is_made_again_by_the_same_build"
    ),
    "hpc_neuro/data/feature_cache/reader.py::_require_whole_shards": _DEMO,
    "hpc_neuro/data/feature_cache/reader.py::require_match": _LACKING_CACHE,
    "hpc_neuro/data/feature_cache/reader.py::select_orientations": _LACKING_CACHE,
    "hpc_neuro/data/feature_cache/reader.py::read_crop": f"{_HERE}::test_slices_of_an_orientation_are_built",
    "hpc_neuro/data/feature_cache/reader.py::_read_codes": _DEMO,
    "hpc_neuro/data/run_journal.py::require_current_form": f"{_HERE}::test_results_of_an_older_version_are_removed",
    "hpc_neuro/data/store/reader.py::": _DEMO,
    "hpc_neuro/data/store/reader.py::explain_damage": _DEMO,
    "hpc_neuro/data/swc/__init__.py::read": _TREES,
    "hpc_neuro/data/swc/__init__.py::_find_offsets": _TREES,
    "hpc_neuro/data/swc/__init__.py::require_header": _TREES,
    "hpc_neuro/demo.py::choose_held_out": f"{_HERE}::test_images_without_trees_are_traced",
    "hpc_neuro/doctor.py::": _NO_ADVICE,
    "hpc_neuro/evaluate/predictions.py::": _DEMO,
    "hpc_neuro/evaluate/predictions.py::__init__": f"{_HERE}::test_predictions_of_another_split",
    "hpc_neuro/evaluate/predictions.py::_check_files": _DEMO,
    "hpc_neuro/evaluate/predictions.py::_check_shards": _DEMO,
    "hpc_neuro/evaluate/predictions.py::_require_voxels": f"{_HERE}::test_a_predicted_tree_in_micrometers_is_converted",
    "hpc_neuro/evaluate/report_page.py::": _NO_ADVICE,
    "hpc_neuro/fetch_teacher.py::": _NO_ADVICE,
    "hpc_neuro/fetch_teacher.py::main": "tests/test_fetch_teacher.py",
    "hpc_neuro/history/__init__.py::": _NO_ADVICE,
    "hpc_neuro/history/checks.py::check_infer": "tests/infer/test_verify.py::test_each_harm_is_named_and_repaired",
    "hpc_neuro/history/checks.py::_read_predictions": _DEMO,
    "hpc_neuro/infer/config.py::__post_init__": f"{_HERE}::test_an_image_is_given",
    "hpc_neuro/infer/status_page.py::": "tests/infer/test_viewer.py",
    "hpc_neuro/infer/verify.py::": _DEMO,
    "hpc_neuro/infer/viewer.py::": _NO_ADVICE,
    "hpc_neuro/infer/viewer_layers.py::_read_state": f"{_HERE}::test_a_damaged_state_of_the_viewer_is_written_again",
    "hpc_neuro/infer/viewer_layers.py::_read_trees": _DEMO,
    "hpc_neuro/infer/viewer_layers.py::_voxel_size": (
        f"{_HERE}::test_predictions_without_a_voxel_size_are_written_again"
    ),
    "hpc_neuro/info.py::": _NO_ADVICE,
    "hpc_neuro/info.py::_describe_tree": _TREES,
    "hpc_neuro/models/config.py::__post_init__": f"{_TEACHERS}::test_a_trained_teacher_is_given_its_folder",
    "hpc_neuro/models/student.py::load_student": _DEMO,
    "hpc_neuro/models/student_folder.py::find_student": f"{_HERE}::test_a_student_is_in_its_weights_folder",
    "hpc_neuro/models/teacher.py::": f"{_TEACHERS}::test_a_trained_teacher_is_given_its_folder",
    "hpc_neuro/models/teacher.py::_load_by_card": _FETCHED,
    "hpc_neuro/models/teacher.py::_same_patch": (
        f"{_TEACHERS}::test_the_file_of_a_trained_teacher_is_given_as_its_folder"
    ),
    "hpc_neuro/models/teacher_folder.py::advice": _FETCHED,
    "hpc_neuro/napari_plugin/layers.py::_read_traces": f"{_HERE}::test_a_damaged_index_of_traces_is_written_again",
    "hpc_neuro/napari_plugin/layers.py::_read_entries": _DEMO,
    "hpc_neuro/napari_plugin/layers.py::_read_places": f"{_HERE}::test_a_damaged_table_of_places_is_written_again",
    "hpc_neuro/precompute/cache_tool.py::": _NO_ADVICE,
    "hpc_neuro/precompute/cache_tool.py::verify_cache": _DEMO,
    "hpc_neuro/precompute/cache_tool.py::describe_cache": _OTHER_CACHE,
    "hpc_neuro/prepare/check.py::measure_pair": (
        "tests/faults/test_advice_tools.py::test_a_flipped_tree_fits_after_the_advised_change"
    ),
    "hpc_neuro/runs.py::": _NO_ADVICE,
    "hpc_neuro/runs.py::list_runs": f"{_HERE}::test_the_folder_of_the_runs_is_given",
    "hpc_neuro/score_tool.py::": _NO_ADVICE,
    "hpc_neuro/score_tool.py::score": (
        "tests/faults/test_advice_tools.py::test_trees_of_two_units_are_scored_after_a_conversion"
    ),
    "hpc_neuro/score_tool.py::main": f"{_HERE}::test_two_trees_are_scored",
    "hpc_neuro/search/report_page.py::": _NO_ADVICE,
    "hpc_neuro/search/report_page.py::_render_result": _STUDY,
    "hpc_neuro/search/verb.py::run": _STUDY,
    "hpc_neuro/search/verb.py::_require_same_study": _STUDY,
    "hpc_neuro/search/verb.py::_write_best_config": _STUDY,
    "hpc_neuro/swc_tool.py::": _NO_ADVICE,
    "hpc_neuro/swc_tool.py::main": f"{_HERE}::test_a_tree_is_given",
    "hpc_neuro/swc_tool.py::_choose_unit": _TREES,
    "hpc_neuro/teacher/probe.py::": _NO_ADVICE,
    "hpc_neuro/teacher/verbs.py::choose_objective": (
        "tests/teacher/test_continue.py::test_a_teacher_in_the_package_is_continued_by_its_own_objective"
    ),
    "hpc_neuro/trace_stacks/config.py::__post_init__": f"{_HERE}::test_a_stack_is_given",
    "hpc_neuro/train/config.py::_check_losses": f"{_HERE}::test_a_training_without_a_cache",
    "launch/__main__.py::": _NO_ADVICE,
    "launch/status.py::require_idle": "tests/faults/test_advice_tools.py::test_a_queued_job_is_canceled",
    "launch/sweep/cli.py::main": _NO_ADVICE,
    "launch/sweep/trial.py::main": _NO_ADVICE,
}
"""FILE::FUNCTION that a message stands in, without the function for a constant -> the test that obeys it."""


def list_messages() -> Iterator[str]:
    """The place of every text with a command, docstrings aside."""
    for folder in ("hpc_neuro", "launch"):
        for path in sorted((REPO / folder).rglob("*.py")):
            name = path.relative_to(REPO).as_posix()
            yield from (f"{name}::{function}" for function in _list_functions(ast.parse(path.read_text()), ""))


def _list_functions(node: ast.AST, function: str) -> Iterator[str]:
    """The function around each text with a command below a node."""
    if isinstance(node, ast.FunctionDef):
        function = node.name
    if isinstance(node, ast.JoinedStr):
        values = [str(value.value) if isinstance(value, ast.Constant) else "{" for value in node.values]
        if _COMMAND.search("".join(values)):
            yield function
        return
    if isinstance(node, ast.Constant):
        if isinstance(node.value, str) and _COMMAND.search(node.value):
            yield function
        return
    for child in ast.iter_child_nodes(node):
        is_docstring = isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
        if not is_docstring:
            yield from _list_functions(child, function)


def test_every_message_is_in_the_register() -> None:
    assert sorted(set(list_messages())) == sorted(REGISTER)


def test_the_tests_of_the_register_exist() -> None:
    for place, test in REGISTER.items():
        if test == _NO_ADVICE:
            continue
        file, _, function = test.partition("::")
        text = Path(REPO / file).read_text()
        assert not function or f"def {function}(" in text, f"{place}: {test}"
