"""Every fault: how it is made, what has to happen, and what makes it: a function, or tests."""

import dataclasses
from collections.abc import Callable

from faults import inputs, peers, restores, storms, writers
from faults.bench import Bench, Outcome
from faults.size import EXAMPLES, Size

Run = Callable[[Bench, Size], Outcome]


@dataclasses.dataclass(frozen=True)
class Row:
    """A fault.

    Attributes:
        name: its number in the matrix of 59; those above are of more than that.
        fault: what is broken.
        made: how.
        expected: what has to happen.
        run: does it to processes; None where tests do.
        tests: `test_lock.test_name`, in tests/; run by pytest as the row is.
    """

    name: str
    fault: str
    made: str
    expected: str
    run: Run | None = None
    tests: tuple[str, ...] = ()


GROUPS: dict[str, tuple[Row, ...]] = {
    "Crashes and durability": (
        Row(
            "1",
            "SIGKILL at a random moment of training with asynchronous saves",
            "a save every 5 steps; one kill in five at a moment of the start, the rest within "
            "2.5 s of the first new step; the same command each time, until the run is complete",
            "no committed step lost, no loss other than the undisturbed run's",
            storms.storm,
        ),
        Row(
            "2",
            "SIGKILL in the first save",
            "as soon as files of it are there",
            "begins anew; what was left is removed",
            storms.in_first_save,
        ),
        Row(
            "3",
            "SIGKILL between Orbax's commit and the manifest",
            "`Store.seal` of step 30 kills the process",
            "step 30 is no checkpoint; goes on from 20",
            storms.before_manifest,
        ),
        Row(
            "4",
            "SIGKILL while an old checkpoint is deleted",
            "half of its files removed, then the kill; the tests: at each of six moments",
            "what is left is never a checkpoint; the rest goes at the next start",
            storms.in_deletion,
            (
                "test_store."
                "test_a_kill_within_a_deletion_leaves_nothing_that_is_taken_for_a_checkpoint",
            ),
        ),
        Row(
            "5",
            "leftovers of crashes, folders of others",
            "an unfinished save of this run and 4 foreign folders among the checkpoints",
            "only its own goes",
            restores.in_process("5"),
        ),
        Row(
            "6",
            "disk full during a save",
            "RLIMIT_FSIZE of 16 KiB on the running process, lifted after a save failed",
            "goes on; tells with free space; leaves nothing; the next save works",
            storms.disk_full,
        ),
        Row(
            "7",
            "the folder cannot be written, or is a file",
            "a file, /proc, a file in place of checkpoints, a local tier in /proc",
            "exit code 2 before anything is compiled",
            inputs.no_place,
        ),
        Row(
            "8",
            "power loss: renamed, but empty",
            "each metadata file, manifest and JSON item cut to nothing. Losing power itself cannot "
            "be had here; that all is synced before the manifest has its name is a test",
            "found; falls back",
            restores.in_process("8"),
            ("test_manifest.test_all_is_synced_before_the_manifest_has_its_name",),
        ),
        Row(
            "9",
            "SIGTERM",
            "to a training between two checkpoints",
            "saved, exit code 75, the same command goes on",
            storms.asked_to_stop,
        ),
        Row(
            "10",
            "SIGTERM to one of two processes",
            "to process 1",
            "both save the same step, exit code 75",
            peers.asked_one,
        ),
        Row(
            "11",
            "a second SIGTERM or SIGINT",
            "1.5 s after the first, while the training hangs",
            "ends at once with 143 or 130, checkpoints intact",
            None,
            (
                "test_resume.test_a_second_signal_ends_it_at_once_with_its_checkpoints_intact",
                "test_preemption.test_one_request_that_is_delivered_twice_is_one",
            ),
        ),
    ),
    "Corruption": (
        Row(
            "12",
            "a flipped bit in a checkpoint",
            "a random bit of a random file, in turn through every kind of file, in a copy",
            "found, named; falls back; renamed",
            restores.in_process("12"),
            ("test_checkpoint_faults.test_orbax_alone_restores_a_flipped_bit_in_silence",),
        ),
        Row(
            "13",
            "a flipped bit in every checkpoint",
            "as above, in all three; the tests: a bit of the run's id, and all of them gone",
            "refused, exit code 2; never begins anew",
            restores.in_process("13"),
            (
                "test_checkpoint_faults."
                "test_a_run_that_lost_its_name_or_its_checkpoints_does_not_begin_anew",
            ),
        ),
        Row(
            "14",
            "cut, missing, extra files; a manifest missing or garbage",
            f"{len(restores.HARMS)} kinds of damage",
            "as a flipped bit",
            restores.in_process("14"),
        ),
        Row(
            "15",
            "an empty folder with a number, a link, another run's checkpoint",
            "planted above the newest step",
            "not taken, not touched",
            restores.in_process("15"),
        ),
        Row(
            "16",
            "NaN or infinity inside a checkpoint that fits its manifest",
            "saved past the watcher",
            "found after restoring; falls back",
            restores.in_process("16"),
        ),
        Row(
            "17",
            "a run goes on, laid out anew, in the folder that it reads",
            "the first checkpoint of a run, on 2 devices in place of 1",
            "the source stays as it was",
            inputs.through_reshard,
            ("test_checkpoint.test_a_step_that_is_there_is_not_saved_again_in_silence",),
        ),
        Row(
            "18",
            "a bit flips in live parameters",
            "in one device's copy, in a real training on 8 devices; and without the comparison",
            "found at the next comparison, the device named; exit code 17",
            None,
            (
                "test_watching.test_a_bit_that_flips_on_one_device",
                "test_replicas.test_every_flipped_bit_changes_the_digest",
                "test_replicas.test_a_step_that_computes_otherwise_the_second_time",
            ),
        ),
    ),
    "Processes": (
        Row(
            "19",
            "a worker is killed in a step",
            "SIGKILL to process 1 of 2; the tests start all again by the launcher",
            "the other ends in 2 s, is started again, and the result is bit for bit the same",
            peers.killed(1),
            ("test_launch.test_killed_and_started_again_is_bit_for_bit_the_undisturbed_run",),
        ),
        Row(
            "20",
            "the coordinator is killed",
            "SIGKILL to process 0 of 2",
            "the other ends in 2 s",
            peers.killed(0),
        ),
        Row(
            "21",
            "a peer is killed while the other one is in no collective",
            "SIGKILL to process 1 while process 0 sleeps between two steps",
            "ends in 2 s: the connection is watched, not the heartbeat",
            peers.killed_while_idle,
            ("test_lifeline.test_one_that_dies_is_told_to_all_others",),
        ),
        Row(
            "22",
            "a peer lives and is stuck",
            "one sleeps in step 6; one is stopped; and without a watchdog",
            "both end within the limit + 2 s, the stuck one named, stacks shown",
            None,
            (
                "test_launch_faults.test_a_stuck_peer_ends_both_in_time_and_is_named",
                "test_launch_faults.test_without_a_watchdog_they_stand_still",
                "test_launch_faults.test_a_stopped_peer_is_named_by_the_other_one",
                "test_launch_faults.test_a_stopped_coordinator_is_named_by_the_other_one",
            ),
        ),
        Row(
            "23",
            "SIGSTOP for 3 s",
            "to process 1 of 2",
            "goes on; losses bit for bit",
            None,
            ("test_launch_faults.test_a_pause_that_is_short_changes_nothing",),
        ),
        Row(
            "24",
            "a peer never starts",
            "one process of two alone, either of them",
            "exit code 69 in its time, with the address",
            None,
            ("test_launch.test_a_process_that_stays_alone_says_where_it_waited",),
        ),
        Row(
            "25",
            "a taken port, an id that is too large, an id twice",
            "id 2 of 2; ids 0, 1 and 1; a listener on the port",
            "refused, or ended with an error, in time; no hang",
            peers.wrong_ids,
            (
                "test_launch.test_a_taken_port_is_refused",
                "test_cluster.test_variables_that_do_not_fit",
            ),
        ),
        Row(
            "26",
            "processes differ in config, data, code or folder",
            "two real processes with one difference",
            "all end with exit code 2 before anything is compiled, the key named",
            None,
            (
                "test_launch.test_another_config_is_refused_by_all",
                "test_launch.test_other_software_is_refused_by_all",
                "test_launch.test_a_workdir_of_its_own_is_refused_by_all",
            ),
        ),
        Row(
            "27",
            "fewer processes, fewer devices on resume",
            "2 processes to 1; 8 devices to 4 to 1",
            "losses to 1e-5, the difference recorded and said",
            None,
            (
                "test_launch.test_two_processes_go_on_as_one_to_rounding",
                "test_resume.test_fewer_devices_go_on_to_rounding",
            ),
        ),
        Row(
            "28",
            "a crash loop",
            "an exception in step 33, each time, under `moejax supervise`",
            "stopped with exit code 70 and a suggestion",
            storms.crash_loop,
            ("test_supervisor.test_a_crash_loop_is_stopped_with_a_suggestion",),
        ),
        Row(
            "29",
            "two trainings on one workdir",
            "two at once; more while the owner is stopped, also by a link; one when it was killed",
            "refused with host, pid and start; a dead owner's lock is taken over; nothing mixed",
            writers.mixed,
            ("test_lock.test_without_the_kernels_lock_both_would_write",),
        ),
        Row(
            "30",
            "one host is slow",
            "300 ms before each batch of process 1",
            "named in the records; no failure",
            None,
            ("test_launch_faults.test_a_host_that_is_slow_is_named",),
        ),
    ),
    "Data": (
        Row(
            "31",
            "no data, or less than a batch",
            "an empty split, an empty file, a batch larger than the text",
            "an error at the start, not zero steps and success",
            inputs.too_little,
            ("test_corpus.test_an_empty_split", "test_data.test_no_text_at_all"),
        ),
        Row(
            "32",
            "a token id that has no embedding",
            "written with a checksum that fits",
            "exit code 2 with file, document and offset",
            None,
            (
                "test_corpus.test_a_token_beyond_the_vocabulary",
                "test_data.test_an_id_beyond_the_vocabulary",
            ),
        ),
        Row(
            "33",
            "odd, cut or missing token files, another dtype",
            "in copies of the data, a training each",
            "exit code 2 when it is opened",
            inputs.wrong_sizes,
            ("test_corpus.test_ids_of_another_dtype",),
        ),
        Row(
            "34",
            "a flipped bit in the data",
            "in tokens, and in what says where documents start; moejax reads no ArrayRecord",
            "exit code 2, the file named; nothing wrong is read",
            inputs.flipped,
            (
                "test_token_file.test_a_flipped_bit_is_found_where_it_is_and_nowhere_else",
                "test_corpus.test_every_flipped_bit_in_the_documents_is_found",
            ),
        ),
        Row(
            "35",
            "a token file is cut off while it is read",
            "under a running training; the tests: padding in its place by policy, and the harm of "
            "a memory map",
            "exit code 2 with file and byte, no SIGBUS",
            inputs.cut_while_training,
            (
                "test_watching.test_a_file_that_is_cut_off_while_training",
                "test_token_file.test_the_same_through_a_memory_map_kills_the_process",
            ),
        ),
        Row(
            "36",
            "other text on resume",
            "one letter of 40 documents, prepared anew",
            "exit code 2, both fingerprints",
            inputs.another_text,
        ),
        Row(
            "37",
            "seed, batch or length changed on resume",
            "one key each",
            "exit code 2, both values",
            inputs.another_order,
        ),
        Row(
            "38",
            "what reads data hangs, dies or raises",
            "the thread that reads ahead; `prepare`'s worker",
            "an error in data.timeout_seconds (--timeout_seconds), with where it is",
            None,
            (
                "test_data.test_a_thread_that_hangs_is_an_error_that_says_where",
                "test_data.test_a_thread_that_is_gone_is_an_error_at_once",
                "test_data.test_an_error_in_the_thread_comes_out_in_the_caller",
                "test_prepare.test_an_error_in_a_worker_comes_out_and_leaves_nothing",
                "test_prepare.test_a_worker_that_is_killed_is_an_error_at_once",
                "test_prepare.test_a_worker_that_hangs_is_an_error_that_names_the_file",
                "test_prepare.test_workers_that_are_stopped_are_an_error_and_leave_nothing",
            ),
        ),
        Row(
            "39",
            "the data end during a run",
            "60 steps over 30 small documents",
            "another epoch, an event each",
            None,
            ("test_watching.test_an_epoch_is_an_event",),
        ),
        Row(
            "40",
            "the order of data after a resume",
            "slices of a batch for any number of processes; batches as a function of seed and step",
            "the same for 1, 2 and 4 processes",
            None,
            (
                "test_data.test_slices_of_a_batch_are_that_batch",
                "test_data.test_seed_and_step_decide",
            ),
        ),
    ),
    "Numbers": (
        Row(
            "41",
            "one batch whose loss and gradients are NaN",
            "ids without an embedding in one batch of a real training",
            "by policy: stop, skip bit for bit, or roll back; without one it is in every parameter",
            None,
            (
                "test_watch.test_a_broken_batch_is_left_without_effect_bit_for_bit",
                "test_watch.test_without_protection_one_broken_batch_is_in_every_parameter_for_ever",
                "test_watching.test_skip_goes_on_without_the_update",
                "test_watching.test_skipped_killed_and_resumed_is_the_undisturbed_run",
                "test_watching.test_rollback_is_the_run_that_had_left_the_batches_out",
            ),
        ),
        Row(
            "42",
            "NaN in many batches in a row",
            "every batch from the fourth on",
            "exit code 17; the last good checkpoint stays, no NaN is saved",
            None,
            (
                "test_watching.test_too_many_skips_in_a_row_stop",
                "test_watching.test_stop_leaves_the_last_checkpoint_and_says_what_happened",
                "test_watching.test_going_back_again_and_again_ends",
            ),
        ),
        Row(
            "43",
            "a spike of the loss",
            "a batch of noise in a real training, under each policy",
            "by policy; what is skipped is recorded and honoured on resume",
            None,
            (
                "test_watching.test_a_batch_of_noise_is_a_spike",
                "test_watching.test_the_list_of_a_run_that_went_back_is_honoured_on_resume",
                "test_watching.test_a_rollback_is_known_to_the_next_process_before_any_save",
            ),
        ),
        Row(
            "44",
            "all tokens to one expert, experts without tokens, NaN logits",
            "a router of zeros in a real training; crafted layers",
            "finite, counted, found as a collapse",
            None,
            (
                "test_watching.test_a_router_that_sends_all_tokens_to_the_same_experts",
                "test_moe.test_experts_without_tokens_have_gradient_0",
                "test_moe.test_a_batch_of_padding_gives_zeros",
                "test_step.test_the_first_quantity_that_is_not_finite_is_named",
            ),
        ),
        Row(
            "45",
            "more tokens than capacity",
            "tables by hand, and random ones",
            "what is dropped is counted; dropped and kept are all",
            None,
            (
                "test_dispatch.test_everybody_to_one_expert_keeps_the_first",
                "test_dispatch.test_capacity_slots_follow_the_rule",
                "test_records.test_routing_record_by_hand",
            ),
        ),
    ),
    "Configs and interfaces": (
        Row(
            "46",
            "an unknown key",
            f"{len(inputs.UNKNOWN)} on the command line, one in a file",
            "exit code 2 with a suggestion",
            inputs.unknown_keys,
        ),
        Row(
            "47",
            "a value that cannot be",
            f"{len(inputs.WRONG)} keys",
            "exit code 2 with key, value, rule",
            inputs.wrong_values,
        ),
        Row(
            "48",
            "a mesh that does not fit",
            f"{len(inputs.MESHES)} meshes",
            "exit code 2 before anything is compiled",
            inputs.wrong_meshes,
            (
                "test_config.test_a_mesh_must_take_exactly_the_devices",
                "test_config.test_a_config_must_fit_its_mesh",
            ),
        ),
        Row(
            "49",
            "a checkpoint of another config",
            "experts, vocabulary, layers, optimizer; the tests: dtype and shape",
            "exit code 2, the differences in one place, no flood on stderr",
            inputs.another_config,
            ("test_checkpoint_faults.test_another_dtype_or_shape_is_one_table_and_no_cast",),
        ),
        Row(
            "50",
            "metadata that ask for 4 TiB, or another dtype",
            "in the array's own metadata, with a manifest that fits",
            "refused before any array is opened; falls back",
            restores.in_process("50"),
            ("test_checkpoint_faults.test_believed_they_end_the_process",),
        ),
        Row(
            "51",
            "names of the state that would become one",
            "keys with `.` and `/`",
            "refused at the save",
            None,
            ("test_checkpoint_faults.test_keys_that_would_become_one_are_refused",),
        ),
        Row(
            "52",
            "a save that does not happen",
            "a step that is there, a save that still runs, a folder of another run",
            "an error or an event, never silence",
            None,
            (
                "test_checkpoint.test_a_step_that_is_there_is_not_saved_again_in_silence",
                "test_checkpoint_faults.test_a_save_that_is_still_running_when_the_next_is_due",
                "test_checkpoint_faults."
                "test_a_checkpoint_of_another_run_is_left_alone_and_its_step_cannot_be_saved",
            ),
        ),
        Row(
            "53",
            "paths and links that lead out of the run",
            "`../../x` as id of the run, links in place of the lock, of files and of folders",
            "refused",
            None,
            (
                "test_store.test_a_lost_id_is_found_in_the_manifests",
                "test_lock.test_a_lock_that_cannot_be_had_is_an_input_error",
                "test_manifest.test_links_and_special_files_are_refused",
            ),
        ),
        Row(
            "54",
            "pickles, YAML objects and Python planted in a run",
            "next to and in checkpoints; each would leave a file when run",
            "never run",
            restores.in_process("54"),
            (
                "test_imports.test_nobody_unpickles",
                "test_corpus.test_documents_are_never_unpickled",
            ),
        ),
        Row(
            "55",
            "a checkpoint of an older format",
            "one of every format is kept in tests/data",
            "restored bit for bit; a newer one is refused",
            None,
            (
                "test_format.test_a_checkpoint_of_every_format_is_restored_bit_for_bit",
                "test_checkpoint_faults."
                "test_a_checkpoint_of_a_newer_format_is_neither_passed_over_nor_renamed",
            ),
        ),
        Row(
            "56",
            "the clock on the wall jumps",
            "back and forth by hours, in the ledger of a run",
            "no duration changes",
            None,
            ("test_ledger.test_a_clock_on_the_wall_that_jumps_changes_no_duration",),
        ),
        Row(
            "57",
            "out of memory",
            "RESOURCE_EXHAUSTED in step 25; the tests: while restoring",
            "an error with bytes of a device; no partial checkpoint; goes on from 20",
            storms.out_of_memory,
            ("test_checkpoint_faults.test_what_cannot_be_restored_here_stays_where_it_is",),
        ),
        Row(
            "58",
            "a sink of metrics fails",
            "a full disk under metrics.jsonl, TensorBoard, events, ledger, choices, pictures, log",
            "training goes on; said once",
            None,
            (
                "test_metric_writer.test_full_disk_does_not_stop_training_and_loses_nothing",
                "test_tensorboard.test_tensorboard_failure_is_logged_once_and_training_goes_on",
                "test_events.test_a_file_that_cannot_be_written_is_said_once",
                "test_ledger.test_a_full_disk_is_said_once",
                "test_replay.test_choices_that_cannot_be_written_leave_nothing_and_stop_nothing",
                "test_plots.test_pictures_that_cannot_be_drawn_do_not_end_a_run",
                "test_checkpoint_faults.test_a_log_on_the_full_disk_hides_no_failure",
                "test_resume.test_a_log_on_a_full_disk_does_not_end_a_training",
            ),
        ),
        Row(
            "59",
            "something leaks",
            "saves, one after the other, in one process, and a restore after every tenth",
            "open files and threads stay, memory grows by less than 50 MiB",
            restores.in_process("59"),
        ),
    ),
    "Beyond the matrix": (
        Row(
            "60",
            "malformed configs, and inputs of `prepare`, `eval`, `generate`, `fsck`",
            f"by hypothesis, {EXAMPLES:,} of each: keys, values and Python that raises; files and "
            "folders cut, filled, swapped, linked, with manifests that fit and without",
            "exit code 2 with a line of ours (of `fsck` 1 for damage); no traceback, no hang, "
            "nothing outside touched",
            None,
            (
                "test_fuzz.test_malformed_configs",
                "test_fuzz.test_malformed_inputs_of_prepare",
                "test_fuzz.test_malformed_inputs_of_eval",
                "test_fuzz.test_malformed_inputs_of_generate",
                "test_fuzz.test_malformed_inputs_of_fsck",
            ),
        ),
    ),
}
ROWS: dict[str, Row] = {row.name: row for group in GROUPS.values() for row in group}
