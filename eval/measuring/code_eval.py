"""The metric `code_eval`, which lm-eval's HumanEval and MBPP compute, in a sandbox and without the hub.

lm-eval's tasks load it from the hub by its name, and run programs in copies of the process that holds the model.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import evaluate
import numpy as np

from cordee import sandbox
from cordee.errors import UserError
from eval.measuring.asked import CONFIRM

NAME = "code_eval"


class CodeEval:
    """What `evaluate.load("code_eval")` gives: pass@k (Chen et al. 2021, arXiv:2107.03374)."""

    def compute(
        self,
        *,
        references: Sequence[str],
        predictions: Sequence[Sequence[str]],
        k: Sequence[int] = (1, 10, 100),
        num_workers: int = 4,
        timeout: float = 3.0,
    ) -> tuple[dict[str, float], dict[int, list[tuple[int, dict[str, Any]]]]]:
        """Run each candidate with the test of its problem.

        Args:
            references: for each problem, the source of its test.
            predictions: for each problem, the sources of the candidates.
            k: of how many candidates one has to be right; left out where a problem has fewer.
            num_workers: programs at once.
            timeout: seconds for each program.

        Returns:
            the mean of `pass@k` over the problems for each k; for each problem, each candidate's number and outcome.

        Raises:
            Fault: there is no sandbox.
        """
        with ThreadPoolExecutor(num_workers) as pool:
            running = [
                [pool.submit(sandbox.run, f"{candidate}\n{test}", timeout) for candidate in candidates]
                for candidates, test in zip(predictions, references, strict=True)
            ]
            outcomes = [[one.result() for one in own] for own in running]
        results = {
            problem: [
                (number, {"task_id": problem, "passed": said == "passed", "result": said, "completion_id": number})
                for number, said in enumerate(own)
            ]
            for problem, own in enumerate(outcomes)
        }
        counts = [(len(own), own.count("passed")) for own in outcomes]
        means = {
            f"pass@{n}": float(np.mean([pass_at_k(total, right, n) for total, right in counts]))
            for n in k
            if all(total >= n for total, _ in counts)
        }
        return means, results


def pass_at_k(total: int, right: int, k: int) -> float:
    """The share of draws of k among all candidates with a right one, 1 - C(total - right, k) / C(total, k).

    Computed as a product, in the form and with the rounding of the paper's figure 3.
    """
    if total - right < k:
        return 1.0
    return float(1.0 - np.prod(1.0 - k / np.arange(total - right + 1, total + 1)))


@contextmanager
def offered(*, confirmed: bool) -> Iterator[None]:
    """While tasks are loaded, give them this metric where they ask `evaluate` for `code_eval`.

    Raises:
        UserError: a task asks for it, and that code of models is run is not confirmed.
        Fault: a task asks for it, and there is no sandbox.
    """
    original = evaluate.load

    def load(path: str, *arguments: Any, **named: Any) -> Any:
        if path != NAME:
            return original(path, *arguments, **named)
        if not confirmed:
            raise UserError(f"a task computes {NAME}, which runs code that the models write", key="tasks", hint=CONFIRM)
        sandbox.check()
        return CodeEval()

    evaluate.load = load
    try:
        yield
    finally:
        evaluate.load = original


def is_used_by(task: Any) -> bool:
    """Whether the functions that judge the answers of lm-eval's task are in a module that has loaded this metric."""
    functions = [*(told["metric"] for told in task.config.metric_list or ()), task.config.process_results]
    modules: list[Mapping[str, Any]] = [getattr(function, "__globals__", {}) for function in functions]
    return any(isinstance(value, CodeEval) for module in modules for value in module.values())


def notes(task: Any) -> list[str]:
    """What a reader of a task's figures should know of how its programs were run."""
    if not is_used_by(task) or sandbox.check():
        return []
    return ["the programs that the model wrote could read files: this machine's kernel has no Landlock"]
