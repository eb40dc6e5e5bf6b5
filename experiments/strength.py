"""Zero-shot video to video: agreement with the video and with the caption, by strength."""

from causvid_jax.training.experiment import Experiment, Row


def get_experiment() -> Experiment:
    """Return the student on clips of another colour: digit and direction are the video's, colour the caption's."""
    return Experiment(
        title="Video to video by strength",
        claim="CausVid, section 5.3: the student edits videos zero-shot.",
        rows=tuple(Row(f"strength {strength}", strength=strength) for strength in (0.25, 0.5, 0.75, 1.0)),
        metric="color",
    )
