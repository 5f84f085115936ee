"""All tests here are marked `robustness` and stay out of `make test`, except for a handful."""

from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
IN_THE_DEFAULT_RUN = {
    "test_a_step_that_is_not_finite_is_skipped_counted_and_recorded",
    "test_the_split_into_micro_batches_changes_no_step",
    "test_bad_input_in_a_process_of_its_own",
    "test_no_source_unpickles_or_runs_code_of_a_model",
    "test_nothing_needs_what_macos_and_windows_lack",
}


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents and item.originalname not in IN_THE_DEFAULT_RUN:
            item.add_marker(pytest.mark.robustness)
