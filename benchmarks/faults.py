"""What happens when something fails: plants each fault in real processes and writes the table of docs/reliability.md.

python benchmarks/faults.py            runs the test of each row (half an hour on two cores)
python benchmarks/faults.py --list     writes the table without running anything
"""

import argparse
import datetime as dt
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "reliability.md"
MARKS = "<!-- faults -->\n", "<!-- end -->\n"
SUPERVISOR, RANKS = "tests/system/test_supervisor.py", "tests/system/test_supervised_ranks.py"
RUNNER = "tests/cordee/test_runner.py"


@dataclass(frozen=True)
class Row:
    """A fault, what happens then, and the test that plants it."""

    fault: str
    happens: str
    file: str
    test: str


ROWS = (
    Row("a process of a stage is killed (`kill -9`)", "restarted from the last resume point",
        SUPERVISOR, "test_what_passes_is_restarted_from_the_last_resume_point_and_told"),
    Row("a process is told to end by someone else (SIGTERM)", "it saves, and is restarted",
        SUPERVISOR, "test_a_process_that_is_told_to_end_by_someone_else_saves_and_is_restarted"),
    Row("one of two ranks is killed", "seen within 3 s, named, restarted; the same bits",
        RANKS, "test_a_rank_that_is_killed_is_seen_within_three_seconds_and_the_bits_are_the_same"),
    Row("all ranks are killed, or accelerate's launcher", "restarted; the same bits",
        RANKS, "test_all_ranks_or_their_launcher_are_killed_and_the_bits_are_the_same"),
    Row("`cordee run` is killed", "its stage ends at once; the next run continues and tells what was lost",
        SUPERVISOR, "test_what_was_lost_with_the_run_itself_is_told_by_the_next"),
    Row("a process is stopped, or holds the GIL", "seen within 10 s; the stacks are in the log; restarted",
        SUPERVISOR, "test_a_hang_is_seen_within_ten_seconds_and_its_stacks_are_kept"),
    Row("one of two ranks is stopped", "named; the stacks of both are in the log; restarted; the same bits",
        RANKS, "test_a_rank_that_is_stopped_is_named_and_the_bits_are_the_same"),
    Row("steps take up to four times as long as others", "no alarm in 1,000 steps",
        "tests/cordee/test_pace.py", "test_no_false_alarm_in_a_thousand_steps_with_fourfold_jitter"),
    Row("one process is slower than the others", "named once, by rank and host; nothing is restarted",
        SUPERVISOR, "test_a_slow_process_is_an_incident_and_nothing_is_restarted"),
    Row("a step fails the same way twice", "stops with the diagnosis",
        SUPERVISOR, "test_the_same_failure_at_the_same_step_twice_stops_with_the_diagnosis"),
    Row("the loss is NaN, memory runs out, a crash of unknown cause", "stops at once, says which and what to change",
        SUPERVISOR, "test_what_would_end_so_again_is_not_restarted"),
    Row("the kernel kills a process for memory (cgroup)", "told apart from a kill by a person; stops with advice",
        SUPERVISOR, "test_what_the_kernel_kills_for_memory_is_told_apart_from_what_a_person_kills"),
    Row("out of memory in a training", "names the key to change and the bytes that it saves",
        "tests/cordee/test_supervisor.py", "test_out_of_memory_names_the_key_and_what_it_saves"),
    Row("a message of torch, NCCL, gloo, vLLM, CUDA, Slurm or Linux", "its cause is named",
        "tests/cordee/test_causes.py", "test_a_message_names_its_cause"),
    Row("the disk is full", "stops in a line; continues once there is space; earlier artifacts are whole",
        SUPERVISOR, "test_a_full_disk_ends_it_in_a_line_and_it_continues_once_there_is_space"),
    Row("a failing disk or connection (EIO, ECONNRESET)", "restarted, once a file can be written again",
        SUPERVISOR, "test_what_passes_is_restarted_from_the_last_resume_point_and_told"),
    Row("two runs of one recipe", "one works; the other ends in a line that says who does",
        SUPERVISOR, "test_of_two_runs_of_one_recipe_one_works_and_the_other_says_who_does"),
    Row("the port for the processes to meet is taken", "another is taken",
        SUPERVISOR, "test_a_port_that_is_taken_is_not_used"),
    Row("Ctrl-C, SIGTERM, the terminal's end", "the state is saved first; the next run continues",
        RUNNER, "test_ctrl_c_stops_cleanly_and_the_next_run_goes_on"),
    Row("a killed write of a resume point", "the one before is used",
        "tests/pretrain/test_resume.py", "test_wherever_it_dies_the_next_run_leaves_the_same_files"),
)  # fmt: skip


def outcome(row: Row) -> str:
    """Run a row's test; what pytest says of it in its last line."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        "long or not long",
        f"{row.file}::{row.test}",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    last = done.stdout.strip().splitlines()[-1].strip("= ").partition(" in ")[0]
    print(f"{last:24} {row.test}", flush=True)
    return last


def table(outcomes: list[str] | None) -> str:
    """The rows as Markdown, with what their tests said where they were run."""
    head = "| fault | what happens | test |" + (" outcome |" if outcomes else "")
    lines = [head, "|---|---|---|" + ("---|" if outcomes else "")]
    for place, row in enumerate(ROWS):
        where = f"`{row.file.removeprefix('tests/')}::{row.test}`"
        lines.append(f"| {row.fault} | {row.happens} | {where} |" + (f" {outcomes[place]} |" if outcomes else ""))
    when = f"\nRun on {dt.datetime.now(dt.UTC).date()}.\n" if outcomes else ""
    return "\n".join(lines) + "\n" + when


def main() -> None:
    """Write the table between the marks of the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="write the table without running anything")
    outcomes = None if parser.parse_args().list else [outcome(row) for row in ROWS]
    text = DOCUMENT.read_text(encoding="utf-8")
    before, after = text.partition(MARKS[0])[0], text.partition(MARKS[1])[2]
    DOCUMENT.write_text(f"{before}{MARKS[0]}{table(outcomes)}{MARKS[1]}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
