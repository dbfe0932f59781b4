"""The entry point of every stage: `python -m pretrain.corpus …` or `accelerate launch -m posttrain.sft …`.

It is started in one of two ways:

- `--job FILE`, by the runner, which has prepared the output folder and publishes it;
- `--config FILE [key=value …]`, by hand; see `cordee.alone`.
"""

import argparse
import io
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cordee import alone, events, files, hashes, heartbeat, lock
from cordee.config import Config
from cordee.errors import CordeeError, Fault, from_system
from cordee.launchers import RUNNER
from cordee.machine import die_with_parent
from cordee.shown import hidden
from cordee.stage import ASKED, Context

Run = Callable[[Any, Context], dict[str, Any]]


def main(config_type: type[Config], run: Run) -> None:
    """Run the stage whose module was started; on an error, the process ends with its exit code."""
    spec = sys.modules["__main__"].__spec__
    uses = spec.name if spec else "stage"
    parser = argparse.ArgumentParser(prog=f"python -m {uses}", allow_abbrev=False)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--job", type=Path, help="a job file that `cordee run` wrote")
    source.add_argument("--config", type=Path, help="a YAML file with the stage's keys, and `seed` if not 0")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where artifacts are published")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    _offline()
    sys.stdin = io.StringIO()  # no library may ask, such as whether to run a model's code
    heartbeat.register()
    try:
        if arguments.job:
            _die_with_runner()
            signal.signal(signal.SIGTERM, lambda *_: ASKED.set())
            _run_job(arguments.job, config_type, run)
        else:
            alone.run(uses, arguments.config, arguments.overrides, arguments.runs, lambda c, k: run_stage(c, k, run))
    except CordeeError as error:
        sys.stderr.write(f"{uses}: {error}\n")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.stderr.write(f"{uses}: interrupted; the next run continues from the last state that was saved\n")
        sys.exit(130)


def _run_job(job_file: Path, config_type: type[Config], run: Run) -> None:
    """Run one job; its metrics are written to `result.json`, its error to the events."""
    job = files.read_json(job_file)
    hashes.trust(job.get("hashes", {}))
    context = Context(out=Path(job["out"]), seed=job["seed"], events=Path(job["events"]))
    try:
        metrics = run_stage(config_type.model_validate(job["config"]), context, run)
    except CordeeError as error:
        events.append_error(context.events, error)
        raise
    if context.is_main:
        files.write_json(context.events.parent / "result.json", metrics)


def run_stage(config: Config, context: Context, run: Run) -> dict[str, Any]:
    """Call a stage's `run`; an exception that is no `CordeeError` becomes a fault of one line.

    Raises:
        CordeeError: the stage failed; the stack trace of any other exception is printed to the log.
    """
    try:
        return run(config, context)
    except CordeeError:
        raise
    except OSError as error:
        sys.stderr.write(hidden(traceback.format_exc()))
        raise from_system(error, context.out) from error
    except Exception as error:
        sys.stderr.write(hidden(traceback.format_exc()))
        log = context.events.with_name("log.txt")
        hint = f"the details are in {log}" if log.exists() else "the details are above"
        raise Fault(f"{type(error).__name__}: {error}", file=context.out, hint=hint) from error
    finally:
        context.ends()


def _offline() -> None:
    """Keep libraries from using a network, whatever the environment says; the hub's token stays outside."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        os.environ.pop(name, None)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        os.environ[name] = "1"


def _die_with_runner() -> None:
    """Have this process killed with its runner or launcher, so that no orphan continues to write.

    Raises:
        Fault: the runner was killed before this process could ask to die with it.
    """
    die_with_parent()
    runner = os.environ.get(RUNNER)
    if runner and lock.is_gone(json.loads(runner)):
        raise Fault("the run that started this stage is gone")
