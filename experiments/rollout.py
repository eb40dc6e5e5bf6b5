"""Noised data or the student's own rollout in the distillation."""

from causvid_jax.training.experiment import PAPER_SAMPLER, Experiment, Row


def get_experiment() -> Experiment:
    """Return both forms of ``train_distill.rollout``, and cached context with a gradient (replay)."""
    return Experiment(
        title="Rollout of the distillation",
        claim="CausVid, section 4.2: noised data. Self-Forcing (arXiv 2506.08009): the student's own rollout.",
        rows=(
            Row("noised data", stages=("distill",), settings={"train_distill.rollout": "data"}),
            Row("own rollout", stages=("distill",)),
            Row("own rollout, gradient replay", stages=("distill",), settings={"train_distill.gradient": "replay"}),
        ),
        lengths=(1, 10),
        # Noised data has no rollout to continue, and replay none beyond a clip with a sink that moves.
        settings={
            **PAPER_SAMPLER,
            "train_distill.continuation_prob": "0.0",
            "train_distill.prompt_switch_prob": "0.0",
        },
    )
