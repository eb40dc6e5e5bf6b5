"""Tab. 4 of the paper: ODE initialisation, and a bidirectional or a causal real score."""

from causvid_jax.training.experiment import PAPER_SAMPLER, Experiment, Row


def get_experiment() -> Experiment:
    """Return the rows of Tab. 4; the paper's figures are temporal quality, frame quality and text alignment."""
    distilled = ("distill",)
    return Experiment(
        title="Initialisation and teacher",
        claim="CausVid, Tab. 4: ODE initialisation and a bidirectional teacher give the best few-step causal student.",
        rows=(
            Row("many-step bidirectional teacher", network="teacher", paper="94.6 / 62.7 / 29.6"),
            Row("many-step causal teacher", network="causal", paper="92.4 / 60.1 / 28.5"),
            Row(
                "no ODE initialisation, bidirectional teacher",
                stages=distilled,
                settings={"train_distill.init": "teacher"},
                paper="93.4 / 60.6 / 29.4",
            ),
            Row("ODE initialisation alone", network="init", paper="92.9 / 48.1 / 25.3"),
            Row(
                "ODE initialisation, causal teacher",
                stages=distilled,
                settings={"train_distill.teacher": "causal"},
                paper="91.9 / 61.7 / 28.2",
            ),
            Row("ODE initialisation, bidirectional teacher", stages=distilled, paper="94.7 / 64.4 / 30.1"),
        ),
        settings=PAPER_SAMPLER,
    )
