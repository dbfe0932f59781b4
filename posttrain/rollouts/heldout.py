"""The reward of completions of held-out prompts, by the same rewards as in training."""

from typing import Any

import torch

from posttrain.rollouts.sampling import HELDOUT


def measure(trainer: Any, _weigh: Any = None) -> dict[str, float]:
    """Means over the prompts of `eval_dataset`, named `heldout_…`.

    Each is answered once, greedily, or `num_generations_eval` times from the same seeds at every measurement.
    Every process measures all of them.

    Args:
        trainer: of class `Rollouts`, with an `eval_dataset`.

    Returns:
        Numbers by name: `heldout_reward`, the mean over prompts of the weighted sum of rewards, in their unit;
        `heldout_reward_error`, its standard error over prompts, 0 of a single one; `heldout_length`, the mean number of
        tokens that were sampled, end token included; `heldout_clipped_ratio`, the share of answers that were cut off,
        0 to 1; and `heldout_rewards/NAME`, the mean over the answers that a reward applies to.

    Raises:
        Fault: a batch of TRL's is not what was sampled.
    """
    rows, each = trainer.eval_dataset, trainer.args.num_generations_eval or 1
    trainer.num_generations_eval = each
    at_once = max(1, trainer.args.generation_batch_size // each)
    was_training, rewards, tokens, ended = trainer.model.training, [], [], []
    trainer.model.eval()
    for start in range(0, len(rows), at_once):
        places = [place for place in range(start, min(start + at_once, len(rows))) for _ in range(each)]
        trainer.heldout_keys = [(trainer.seed, HELDOUT, place, at % each) for at, place in enumerate(places)]
        with torch.no_grad():
            trainer._generate_and_score_completions([rows[place] for place in places])  # noqa: SLF001
        rewards.append(trainer.rewards_of[: len(places)].double().cpu())
        sampled = trainer._sampled  # noqa: SLF001 - TRL's mask of a completion that was cut may be 0
        tokens += [len(ids) for ids in sampled]
        ended += [ids[-1] in trainer.stops for ids in sampled]
    trainer.model.train(was_training)
    trainer._metrics["eval"].clear()  # noqa: SLF001
    values = torch.cat(rewards)  # [answers, rewards]
    weights = trainer.reward_weights.to(values)
    weighted = (values * weights).nansum(-1)
    weighted[values[:, weights != 0].isnan().all(-1)] = torch.nan
    prompts = weighted.view(-1, each).nanmean(-1)
    prompts = prompts[~prompts.isnan()]
    found = {"heldout_reward": float(prompts.mean()), "heldout_length": sum(tokens) / len(tokens)}
    found["heldout_reward_error"] = float(prompts.std() / len(prompts) ** 0.5) if len(prompts) > 1 else 0.0
    found["heldout_clipped_ratio"] = 1 - sum(ended) / len(ended)
    for at, name in enumerate(trainer.reward_func_names):
        if not values[:, at].isnan().all():
            found[f"heldout_rewards/{name}"] = float(values[:, at].nanmean())
    return found
