"""Every sentence of the page on deploying that promises something has its tests, by name."""

import re
from collections.abc import Iterator

from tests.support import ROOT

PAGE = ROOT / "docs/deploying.md"
PROMISE = re.compile(
    r"refuse|\bagain\b|bit for bit|never|\bkept\b|keeps|goes on|resume|\blost\b|exactly|does not count|not used"
    r"|left out|dropped|stays?\b|waits"
)

# A piece of the sentence, and the tests that hold it; those that begin with _ are faults of tests/chaos.py.
TESTED = {
    "compares the adapter with the simulation's, bit for bit": [
        "test_a_federation_over_grpc_gives_the_simulations_adapter",
        "test_a_node_of_another_name_draws_other_batches",
    ],
    "a worker keeps the model in memory": [
        "test_a_warm_node_gives_the_same_adapter_and_keeps_one_process",
        "test_an_idle_worker_ends",
    ],
    "What a machine cannot do it refuses at the roll call": [
        "test_flash_without_a_gpu_is_refused_at_the_roll_call_with_the_cure",
        "test_a_machine_without_a_compiler_is_refused_with_the_cure",
    ],
    "under another, Flower's own sleep stays": ["test_another_release_keeps_its_own_waits_and_says_so"],
    "It can be run again at any time": ["test_an_installed_kit_keeps_what_is_the_machines_own_and_its_secrets"],
    "accept exactly the keys of the site": [
        "test_only_a_registered_node_with_the_right_root_gets_in",
        "test_a_revoked_node_is_shut_out_and_a_rotated_key_comes_back",
    ],
    "so it is installed once more after every registration": [
        "test_a_node_is_called_as_its_key_and_no_stranger_takes_part"
    ],
    "Two things are kept apart": ["test_the_coordinators_door_for_flwr_opens_to_its_own_machine_only"],
    "A tracker that breaks down is dropped": ["test_a_tracker_that_breaks_down_does_not_end_the_run"],
    "is refused without `--replace`, and so is one for a user who logs in": [
        "test_a_kit_of_another_site_node_or_root_takes_no_place_unless_told",
        "test_a_kit_for_somebody_who_logs_in_is_refused",
    ],
    "a node claims a weight of more than `round.max-weight`": ["test_the_run_ends_as_without_the_hostile_node"],
    "a node fails, hangs or goes away": ["test_a_node_that_keeps_failing_sits_out_and_comes_back"],
    "a reply is late": ["test_a_late_reply_is_counted_and_not_used"],
    "the round does not count and is tried again": [
        "test_a_round_that_does_not_count_is_tried_again_with_growing_pauses",
        "test_a_minimum_number_of_replies_counts_too",
    ],
    "the round waits for them up to `round.wait`": [
        "test_a_run_with_too_few_nodes_left_leaves_its_adapter_and_resumes",
        "test_a_run_with_too_few_nodes_has_an_exit_code_and_says_why",
    ],
    "a reply breaks the contract": [
        "test_a_hostile_update_is_refused_and_the_run_goes_on",
        "test_from_four_on_a_change_far_above_the_others_median_is_refused",
    ],
    "the largest is left out": ["test_of_updates_that_cannot_be_merged_the_largest_is_left_out"],
    "client process or warm worker is killed": ["_kill_client", "_kill_worker", "_hang_client", "_cut_link"],
    "a SuperNode is killed": [
        "_kill_supernode",
        "test_only_a_registered_node_with_the_right_root_gets_in",
        "test_the_node_s_key_and_the_code_of_runs_have_users_of_their_own",
    ],
    "the SuperLink is killed": ["_kill_superlink"],
    "the run's process or the SuperExec is killed, the disk is full or turns read-only": [
        "_kill_serverapp",
        "_kill_superexec",
        "_full_disk",
        "test_a_full_disk_ends_in_a_sentence_and_the_run_goes_on",
        "test_a_folder_that_turns_read_only_ends_in_a_sentence",
    ],
    "the same command, with the same name and directory": [
        "test_a_run_killed_at_random_moments_ends_as_an_unbroken_one"
    ],
    "which is never run again": ["test_a_run_killed_at_random_moments_ends_as_an_unbroken_one"],
    "lost nothing that was finished": ["check", "verify"],
    "before any of it is unpacked": ["test_code_that_a_node_does_not_know_never_runs_there"],
    "After an upgrade, install again on every machine": [
        "test_an_installed_kit_keeps_what_is_the_machines_own_and_its_secrets",
        "test_a_former_site_is_installed_with_this_releases_scripts",
    ],
    "Let the run end, install the release": ["test_a_former_site_is_installed_with_this_releases_scripts"],
    "Checkpoints of the release before are refused in a sentence": [
        "test_a_checkpoint_of_another_release_is_refused_in_a_sentence",
        "test_a_run_of_the_release_before_is_not_gone_on_with",
    ],
    "ledgers of 0.1.0 are read and carried over": [
        "test_a_ledger_of_the_edition_before_counts_in_full_for_whatever_data",
        "test_a_run_of_the_release_before_is_listed_and_reported",
    ],
    "The coordinator keeps its name": ["test_what_stays_of_a_revoked_node_is_its_public_key_and_its_kit"],
    "Of a run's checkpoints the newest are kept": ["test_the_newest_are_kept_and_those_that_were_asked_for"],
    "`checkpoint.every` keeps more": ["test_the_newest_are_kept_and_those_that_were_asked_for"],
    "Whole runs stay until they are deleted": ["test_old_runs_are_deleted_and_all_else_stays"],
    "a run continues with `resume=true`": ["test_what_was_backed_up_is_put_back_and_the_run_goes_on"],
    "on a GPU a message waits": ["test_messages_of_two_runs_take_their_turns_on_one_gpu"],
    "Two workers were kept off one GPU": ["test_a_gpu_has_one_worker_and_is_free_when_that_is_killed"],
    "any other is refused by its digest": [
        "test_code_that_a_node_does_not_know_never_runs_there",
        "test_a_node_that_runs_other_code_is_refused",
    ],
}


def sentences() -> Iterator[str]:
    """The page's sentences and rows, without its commands."""
    prose = re.sub(r"^    .*$", "", PAGE.read_text(), flags=re.MULTILINE)
    for block in re.split(r"\n\s*\n", prose):
        if block.lstrip().startswith("|"):
            yield from block.splitlines()
        else:
            yield from re.split(r"(?<=[.;])\s+", " ".join(block.split()))


def test_every_promise_of_the_page_is_tested():
    untested = [
        sentence
        for sentence in sentences()
        if PROMISE.search(sentence) and not any(" ".join(piece.split()) in sentence for piece in TESTED)
    ]
    assert untested == []


def test_what_is_said_to_test_the_page_is_there():
    page = " ".join(PAGE.read_text().split())
    code = "\n".join(file.read_text() for file in (ROOT / "tests").rglob("*.py"))
    assert [piece for piece in TESTED if piece not in page] == []
    named = {name for tests in TESTED.values() for name in tests}
    assert [name for name in named if not re.search(rf"def {name}\(", code)] == []
