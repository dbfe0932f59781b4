"""How far a student's next-token distributions are from a teacher's: the losses of distillation.

Agarwal et al. 2024, "On-Policy Distillation of Language Models", arXiv 2306.13649, section 2 and equation 1. P is the
teacher's distribution, Q the student's.
"""

import torch


def generalized_jsd(
    student: torch.Tensor, teacher: torch.Tensor, beta: float, temperature: float = 1.0
) -> torch.Tensor:
    """The generalized Jensen-Shannon divergence of each token, in nats.

    JSD(β)(P‖Q) = β KL(P ‖ M) + (1 - β) KL(Q ‖ M) with M = β P + (1 - β) Q. At the ends, where it is 0, it is what it
    becomes when divided by β or 1 - β: KL(P‖Q), forward, at 0; KL(Q‖P), reverse, at 1, as TRL has it.

    Args:
        student: logits, `[tokens, vocab]`.
        teacher: logits, `[tokens, vocab]`.
        beta: from 0 to 1.
        temperature: what both logits are divided by.

    Returns:
        `[tokens]`, in float32 at least.
    """
    p, q = (_log_softmax(logits / temperature) for logits in (teacher, student))
    if beta == 0:
        return kl(p, q)
    if beta == 1:
        return kl(q, p)
    weights = p.new_tensor([beta, 1 - beta]).log()
    mixture = torch.logaddexp(p + weights[0], q + weights[1])
    return beta * kl(p, mixture) + (1 - beta) * kl(q, mixture)


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(P ‖ Q) of log-probabilities, `[tokens, vocab]` each → `[tokens]`; what has no probability in P counts 0."""
    return torch.where(p.isneginf(), 0.0, p.exp() * (p - q)).sum(-1)


def cross_entropy(student: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-log Q of the tokens that stand in the data: logits `[tokens, vocab]`, ids `[tokens]` → `[tokens]`, in nats."""
    return -_log_softmax(student).gather(-1, targets[:, None])[:, 0]


def mixed(
    student: torch.Tensor,
    teacher: torch.Tensor,
    targets: torch.Tensor,
    *,
    beta: float,
    temperature: float,
    cross_entropy_weight: float,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of each token: (1 - w) · divergence + w · cross-entropy.

    Args:
        student: logits, `[tokens, vocab]`.
        teacher: logits, `[tokens, vocab]`.
        targets: the tokens that stand in the data, `[tokens]`.
        beta: of the divergence, from 0 (forward KL) to 1 (reverse KL).
        temperature: of the divergence.
        cross_entropy_weight: w, from 0 to 1.

    Returns:
        the loss `[tokens]`, and `[tokens]` each without gradient: `divergence`, `cross_entropy`, `entropy` (all in
        nats) and `mean_token_accuracy` (0 or 1).
    """
    return with_cross_entropy(
        generalized_jsd(student, teacher, beta, temperature), student, targets, cross_entropy_weight
    )


def with_cross_entropy(
    divergence: torch.Tensor, student: torch.Tensor, targets: torch.Tensor, cross_entropy_weight: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """As `mixed`, of a divergence `[tokens]` that was computed before."""
    loss, likely = divergence, None
    if cross_entropy_weight:
        likely = cross_entropy(student, targets)
        loss = (1 - cross_entropy_weight) * divergence + cross_entropy_weight * likely
    with torch.no_grad():
        q = _log_softmax(student)
        likely = cross_entropy(student, targets) if likely is None else likely
        return loss, {
            "divergence": divergence.detach(),
            "cross_entropy": likely.detach(),
            "entropy": -(q.exp() * q).sum(-1),
            "mean_token_accuracy": (student.argmax(-1) == targets).to(q.dtype),
        }


def _log_softmax(logits: torch.Tensor) -> torch.Tensor:
    return logits.log_softmax(-1, dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32)
