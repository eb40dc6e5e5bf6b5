"""Read video and image files as a player or viewer shows them, and write videos.

Arrays are uint8 ``[T, H, W, 3]``. :func:`to_float` and :func:`to_uint8` convert them to the model's float32 in [-1, 1]
and back.
"""

from causvid_jax.media.background import BackgroundWriter
from causvid_jax.media.images import read_image, read_picture
from causvid_jax.media.output import SUFFIXES, check_output
from causvid_jax.media.pixels import frame_rate, to_float, to_uint8
from causvid_jax.media.reader import iterate_frames, read_video
from causvid_jax.media.writer import VideoWriter, write_video
