"""Initialisation of the student, on which published methods differ."""

from causvid_jax.training.experiment import PAPER_SAMPLER, Experiment, Row


def get_experiment() -> Experiment:
    """Return students that start from ODE pairs of either teacher, from causal consistency, or from a teacher.

    A continuous step takes about twice the time of a discrete one, so there are half as many. With the learning rate of
    the discrete kind the norm of its tangent grows without bound, so it has a smaller one.
    """
    distilled, consistent = ("distill",), {"train_distill.init": "consistency"}
    continuous = {
        **consistent,
        "train_consistency.kind": "continuous",
        "train_consistency.steps": "240",
        "train_consistency.tangent_warmup": "240",
        "train_consistency.optimizer.kind": "adamw",
        "train_consistency.optimizer.learning_rate": "0.0001",
    }
    return Experiment(
        title="Initialisation of the student",
        claim="CausVid, section 4.3: ODE pairs of the bidirectional teacher. Causal Forcing: of a causal teacher.",
        rows=(
            Row(
                "ODE pairs of the bidirectional teacher",
                stages=distilled,
                once=("trajectories", "init"),
                settings={
                    "train_init.teacher": "bidirectional",
                    "train_init.extra_trajectories": "()",
                    "train_init.curriculum": "()",
                },
            ),
            Row("ODE pairs of the causal teacher", stages=distilled),
            Row("discrete causal consistency", stages=distilled, once=("consistency",), settings=consistent),
            Row("continuous causal consistency", stages=distilled, once=("consistency",), settings=continuous),
            Row("the causal teacher itself", stages=distilled, replace={"init": "causal"}),
            Row("the bidirectional teacher", stages=distilled, settings={"train_distill.init": "teacher"}),
        ),
        settings=PAPER_SAMPLER,
    )
