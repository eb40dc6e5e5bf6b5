"""Quality over the number of denoising steps of the student."""

from causvid_jax.training.experiment import Experiment, Row


def get_experiment() -> Experiment:
    """Return students of one, two and four steps, and the teacher.

    All start from one initial student. Its ODE regression has four timesteps, and those of fewer steps are among them.
    """
    distilled = ("distill",)
    return Experiment(
        title="Denoising steps",
        claim="CausVid, section 4: four steps keep the quality of the many-step teacher.",
        rows=(
            Row("teacher", network="teacher"),
            Row("4 steps", stages=distilled),
            Row("2 steps", stages=distilled, settings={"diffusion.denoising_timesteps": "(1000.0, 500.0)"}),
            Row("1 step", stages=distilled, settings={"diffusion.denoising_timesteps": "(1000.0,)"}),
        ),
    )
