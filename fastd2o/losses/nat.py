"""NAT: negative-aware training (Wang et al. 2024, "Learning From Failure", arXiv 2402.11651)."""

from __future__ import annotations

from torch import Tensor

from fastd2o.losses.tokens import cross_entropy_side, reduce_tokens


def nat_loss(
    negative_logp: Tensor,
    negative_mask: Tensor,
    positive_logp: Tensor | None = None,
    positive_mask: Tensor | None = None,
    *,
    reduction: str = "token",
) -> Tensor:
    """Learn *both* sides by cross-entropy, each under a prompt that says which it is.

    ``L = (Σ CE(y_w | x ⊕ "correct") + Σ CE(y_l | x ⊕ "incorrect")) / N``; Wang et al. 2024, arXiv 2402.11651. What
    makes this learning from negatives is the prompt: the log-probabilities must be those of a negative under its own
    suffix ("…incorrectly answers the question"). Without the suffixes this minimises cross-entropy on what the model
    should not say.

    Args:
        negative_logp: [S, L] floating point, token log-probabilities of the negatives under their suffix.
        negative_mask: [S, L] bool, True on the tokens that count. Masked slots may hold anything.
        positive_logp: [S', L'] floating point, token log-probabilities of the positives under theirs; default: no
            positives.
        positive_mask: [S', L'] bool, given together with ``positive_logp``.
        reduction: ``"token"``: N is the counted tokens of both sides together. ``"sequence"``: N is the sequences
            (rows) with a counted token. ``"sum"``: N is 1.

    Returns:
        A scalar in float32 (float64 for float64 inputs); a 0 connected to the graph where nothing counts.

    Raises:
        ValueError: shapes that disagree, an unknown ``reduction``, one of the positive pair missing.
        TypeError: log-probabilities that are not floating point, masks that are not boolean.
    """
    return reduce_tokens(
        *cross_entropy_side("negative", negative_logp, negative_mask),
        *cross_entropy_side("positive", positive_logp, positive_mask),
        reduction=reduction,
    )
