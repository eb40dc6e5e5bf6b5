"""Noised data or the student's own rollout in the distillation."""

from causvid_jax.training.experiment import Experiment, Row


def get_experiment() -> Experiment:
    """Return both forms of ``train_distill.rollout``, and cached context with a gradient (replay)."""
    return Experiment(
        title="Rollout of the distillation",
        claim="CausVid, section 4.2: noised data. Self-Forcing (arXiv 2506.08009): the student's own rollout.",
        rows=(
            Row(
                "noised data",
                stages=("distill",),
                settings={"train_distill.rollout": "data", "train_distill.continuation_prob": "0.0"},
            ),
            Row("own rollout", stages=("distill",)),
            Row("own rollout, gradient replay", stages=("distill",), settings={"train_distill.gradient": "replay"}),
        ),
        lengths=(1, 10),
    )
