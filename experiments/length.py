"""Fig. 8 of the paper: quality over the length of a stream."""

from causvid_jax.training.experiment import Experiment, Row


def get_experiment() -> Experiment:
    """Return streams up to 100 times the trained length.

    Motion is measured too, because a frozen stream has few errors.
    """
    return Experiment(
        title="Quality over the length of a stream",
        claim="CausVid, Fig. 8: the distilled causal student does not accumulate errors; the causal teacher does.",
        rows=(
            Row("student"),
            Row("causal teacher as a stream", network="causal"),
            Row("student without asymmetric distillation", network="init"),
        ),
        lengths=(1, 2, 5, 10, 20, 50, 100),
    )
