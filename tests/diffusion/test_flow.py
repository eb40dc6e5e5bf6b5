"""Flow matching conversions, grids and guidance against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from causvid_jax.analysis import hlo
from causvid_jax.config import ConfigError, DiffusionConfig
from causvid_jax.diffusion import flow, guidance

SHAPE = (2, 3, 2, 2, 4)


def draws(*seeds, shape=SHAPE):
    return [np.random.default_rng(s).standard_normal(shape).astype(np.float32) for s in seeds]


def test_conversions_match_numpy_per_frame():
    x0, noise = draws(0, 1)
    sigma = np.random.default_rng(2).uniform(0.05, 1, SHAPE[:2]).astype(np.float32)
    x_t = np.empty(SHAPE, np.float32)
    for b in range(SHAPE[0]):
        for f in range(SHAPE[1]):
            x_t[b, f] = (1 - sigma[b, f]) * x0[b, f] + sigma[b, f] * noise[b, f]
    velocity = noise - x0
    np.testing.assert_allclose(flow.add_noise(x0, noise, sigma), x_t, atol=1e-6)
    np.testing.assert_allclose(flow.velocity_from(x0, noise), velocity, atol=1e-6)
    np.testing.assert_allclose(flow.x0_from_velocity(x_t, velocity, sigma), x0, atol=1e-6)


def test_no_noise_at_sigma_zero_is_exact():
    x0, noise = draws(0, 1)
    np.testing.assert_array_equal(flow.add_noise(x0, noise, jnp.zeros(SHAPE[:2])), x0)
    np.testing.assert_array_equal(flow.x0_from_velocity(x0, noise, jnp.zeros(SHAPE[:2])), x0)


@pytest.mark.parametrize(
    "shift,expected",
    [(8.0, (1000, 960, 888.8889, 727.2727)), (5.0, (1000, 937.5, 833.3333, 625)), (1.0, (1000, 750, 500, 250))],
)
def test_student_timesteps_are_the_published_warped_lists(shift, expected):
    np.testing.assert_allclose(flow.student_timesteps(DiffusionConfig(shift=shift)), expected, atol=1e-3)


def test_teacher_grid_holds_the_published_points():
    sigmas = flow.teacher_sigmas(DiffusionConfig(shift=8.0, num_inference_steps=50))
    assert sigmas.shape == (51,) and sigmas[0] == 1.0 and sigmas[-1] == 0.0
    np.testing.assert_allclose(1000 * sigmas[[36, 44]], (756.757, 521.739), atol=1e-3)
    assert np.all(np.diff(sigmas) < 0)
    with pytest.raises(ConfigError, match="num_inference_steps is 0"):
        flow.teacher_sigmas(DiffusionConfig(num_inference_steps=0))


def test_guided_velocity_is_one_call_on_both_branches():
    (x,) = draws(0)
    text = np.random.default_rng(1).standard_normal((2, 5, 6)).astype(np.float32)
    null = np.random.default_rng(2).standard_normal((5, 6)).astype(np.float32)
    timestep = np.full((2, 3), 400.0, np.float32)
    batches = []

    def network(x, timestep, text):
        batches.append(x.shape[0])
        return x * flow.expand(timestep / 1000, x) + flow.expand(jnp.tanh(text).sum((1, 2)), x)

    cond = 0.4 * x + np.tanh(text).sum((1, 2))[:, None, None, None, None]
    uncond = 0.4 * x + np.tanh(null).sum()
    for scale in (3.5, 0.5):  # below 1 guidance interpolates
        got = guidance.guided_velocity(network, x, timestep, text, null, scale)
        np.testing.assert_allclose(got, uncond + scale * (cond - uncond), rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(
        guidance.guided_velocity(network, x, timestep, text, null, 1.0), cond, rtol=1e-5, atol=1e-4
    )
    assert batches == [4, 4, 2]


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray, np.ndarray.tolist])
def test_guidance_scales_of_clips_and_of_frames(kind):
    """``[B]`` was taken for scales of frames where B equals F, and numpy arrays were not taken at all."""
    x = draws(0)[0][:, :2]
    text, null, timestep = np.ones((2, 5, 6), np.float32), np.zeros((5, 6), np.float32), np.full((2, 2), 500.0)
    network = lambda x, timestep, text: x + flow.expand(text.sum((1, 2)), x)  # noqa: E731
    for scales in (np.array([2.0, 5.0]), np.array([[2.0, 3.0], [5.0, 6.0]])):
        wide = np.broadcast_to(scales[:, None] if scales.ndim == 1 else scales, (2, 2))
        got = guidance.guided_velocity(network, x, timestep.astype(np.float32), text, null, kind(scales))
        np.testing.assert_allclose(got, x + 30.0 * wide[..., None, None, None], rtol=1e-6)


def test_shapes_that_would_broadcast_are_refused():
    x0, noise = draws(0, 1)
    for function, given in ((flow.add_noise, noise[:1]), (flow.x0_from_velocity, noise[..., :1])):
        with pytest.raises(ConfigError, match="they must be equal"):
            function.__wrapped__(x0, given, 0.5)  # without the check of annotations, which tests alone have


def test_guidance_holds_in_its_interval_alone():
    """Frames of one batch on both sides of the bounds, which belong to it; with two experts too."""
    x = draws(0)[0][:, :2]
    text, null = np.ones((2, 5, 6), np.float32), np.zeros((5, 6), np.float32)
    timestep = np.array([[1000.0, 700.0], [699.0, 300.0]], np.float32)

    def network(x, timestep, text):
        return x + flow.expand(text.sum((1, 2)), x)

    for options, scales in (
        ({"interval": (300.0, 700.0)}, [[1, 4], [4, 4]]),
        ({"interval": (699.5, 1000.0)}, [[4, 4], [1, 1]]),
        ({"interval": (500.0, 1000.0), "low": 3.0, "boundary": 875.0}, [[4, 3], [3, 1]]),
    ):
        scale = guidance.scale_at(timestep, 4.0, **options)
        got = guidance.guided_velocity(network, x, timestep, text, null, scale)
        expected = x + 30.0 * np.array(scales, np.float32)[..., None, None, None]
        np.testing.assert_allclose(got, expected, rtol=1e-6)
    assert guidance.scale_at(timestep, 4.0) == 4.0 and guidance.scale_at(timestep, 1.0, interval=(0.0, 500.0)) == 1.0


@pytest.mark.parametrize("eta", [0.0, 0.3])
def test_guidance_weighs_the_part_parallel_to_the_clean_prediction(eta):
    """Each frame by hand, with one scale and with a scale per frame: the parallel part is eta times the plain one."""
    x, timestep = draws(0)[0], np.array([[1000.0, 700.0, 20.0], [600.0, 300.0, 0.0]], np.float32)
    rng = np.random.default_rng(3)
    cond, uncond = (rng.normal(size=x.shape).astype(np.float32) for _ in range(2))
    text, null = np.ones((2, 5, 6), np.float32), np.zeros((5, 6), np.float32)

    def network(x, timestep, text):
        return jnp.where(flow.expand(text.max((1, 2)), x) > 0, np.repeat(cond, 2, axis=0), np.repeat(uncond, 2, axis=0))

    for scale in (4.0, np.array([[4.0, 1.0, 2.5], [1.0, 8.0, 3.0]], np.float32)):
        got = guidance.guided_velocity(
            network, x, timestep, text, null, jnp.asarray(scale) if np.ndim(scale) else scale, eta
        )
        for index in np.ndindex(2, 3):
            x0 = (x[index] - timestep[index] / 1000 * cond[index]).ravel().astype(np.float64)
            d = (cond[index] - uncond[index]).ravel()
            unit = x0 / np.linalg.norm(x0)
            parallel = (d @ unit) * unit
            extra = np.array(got[index] - cond[index]).ravel()
            weight = scale[index] - 1 if np.ndim(scale) else scale - 1
            np.testing.assert_allclose(extra, weight * (d - parallel + eta * parallel), atol=2e-5)
    plain = guidance.guided_velocity(network, x, timestep, text, null, 4.0, 1.0)
    np.testing.assert_array_equal(plain, guidance.guided_velocity(network, x, timestep, text, null, 4.0))


def test_other_inputs_of_a_guided_network_follow_their_clip():
    """Both branches of a clip are adjacent in the batch, so what is repeated for them must be adjacent too."""
    x, beside = draws(0)[0], np.arange(2, dtype=np.float32)

    def network(x, timestep, text):
        return x + flow.expand(guidance.per_branch(beside, x), x)

    text = np.zeros((2, 5, 6), np.float32)
    got = guidance.guided_velocity(network, x, np.zeros((2, 3), np.float32), text, text[0], 3.0)
    np.testing.assert_allclose(got, x + beside[:, None, None, None, None], rtol=1e-5, atol=1e-5)


def test_guidance_of_a_sharded_batch_sends_nothing():
    """Both prompts of a clip are on its device, so a network without mixing of examples needs no collective."""
    mesh = Mesh(np.asarray(jax.devices()).reshape(8), ("data",), axis_types=(AxisType.Auto,))
    arrays = *draws(0, shape=(8, 3, 4, 4, 2)), np.full((8, 3), 400.0, np.float32), np.ones((8, 5, 6), np.float32)
    null = np.full((5, 6), 0.5, np.float32)

    def guided(x, timestep, text):
        def network(x, timestep, text):
            return x * flow.expand(timestep / 1000, x) + flow.expand(jnp.tanh(text).sum((1, 2)), x)

        return guidance.guided_velocity(network, x, timestep, text, null, 3.5)

    rows = NamedSharding(mesh, PartitionSpec("data"))
    program = jax.jit(guided, in_shardings=(rows,) * 3, out_shardings=rows).lower(*arrays).compile()
    assert hlo.totals(program.as_text()) == {}
    np.testing.assert_allclose(program(*jax.device_put(arrays, rows)), guided(*arrays), rtol=1e-5, atol=1e-5)


def test_steps_that_are_timesteps_and_the_published_table():
    """CausVid's three-step list: 757 and 522 are next to the points 280 and 120 of the grid of shift 8."""
    config = DiffusionConfig(shift=8.0, denoising_timesteps=(1000.0, 757.0, 522.0), warp=False)
    assert flow.student_timesteps(config) == (1000.0, 757.0, 522.0)
    np.testing.assert_allclose(flow.nominal_steps(config), [1000, 280.24, 120.11], atol=0.1)
    assert flow.nominal_steps(DiffusionConfig()) == (1000.0, 750.0, 500.0, 250.0)
    sigmas = [flow.table_sigma(t, 8.0) for t in (1000.0, 757.0, 522.0, 0.0)]
    np.testing.assert_allclose(sigmas, [1.0, 0.756757, 0.521739, 0.007944], atol=1e-6)
    for timestep in flow.student_timesteps(DiffusionConfig()):
        assert flow.table_sigma(timestep, 8.0) == pytest.approx(timestep / 1000)
    # Half way between two entries the published grid, which descends, gives the first: the larger one.
    assert flow.table_sigma(937.5, 1.0) == 0.938 and flow.table_sigma(62.5, 1.0) == 0.063
