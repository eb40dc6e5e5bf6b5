"""Limits and times of the server; the fields are the flags of ``causvid serve``."""

import dataclasses
import ipaddress
from typing import Annotated

from causvid_jax.config import require
from causvid_jax.config.fields import Bounds, Few, Many, ManyOrZero, check_bounds
from causvid_jax.config.recipes import option

Seconds = Annotated[float, Bounds(above=0, most=10**7)]
Bytes = Annotated[int, Bounds(least=1, most=2**36)]


TOKEN = "CAUSVID_TOKEN"
"""The environment variable that holds the token if no flag gives it."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Limits of numbers, times and sizes.

    Raises:
        ConfigError: a value out of bounds.
    """

    host: str = option("127.0.0.1", "Address to listen at. Any other than loopback needs --token.")
    port: Annotated[int, Bounds(least=0, most=65535)] = option(8000, "Port to listen at; 0 takes a free one.")
    token: str = option("", f"Secret that clients must give; also read from {TOKEN}.")
    origin: tuple[str, ...] = option((), "Another origin whose pages may connect, such as https://example.org.")
    webrtc: bool = option(False, "Also send films by WebRTC (extra webrtc).")
    recordings: str = option("recordings", "Directory for recordings and finished jobs.")
    sessions: Few = option(4, "Films that run at the same time; further ones wait in a queue.")
    queue: ManyOrZero = option(16, "Maximum number of waiting sessions.")
    per_address: Many = option(8, "Maximum number of sessions of one address.")
    requests_per_minute: Many = option(600, "Maximum requests and connections of one address in a minute.")
    jobs: Many = option(16, "Maximum number of waiting videos of /v1/videos.")
    kept: Many = option(64, "Maximum number of kept videos and recordings; older ones are removed.")
    ahead: Few = option(3, "Maximum number of unconfirmed blocks that are kept for a player.")
    idle_seconds: Seconds = option(120.0, "A session that sends nothing for so long ends.")
    resume_seconds: Seconds = option(60.0, "Seconds for which a lost connection can be resumed.")
    seconds: Annotated[float, Bounds(above=0, most=86400)] = option(20.0, "Maximum seconds of a video of /v1/videos.")
    upload_bytes: Bytes = option(32 * 2**20, "Largest upload.")
    message_bytes: Bytes = option(4 * 2**20, "Largest message on a WebSocket.")
    picture_pixels: Annotated[int, Bounds(least=1, most=2**28)] = option(
        2**24, "Largest picture, checked before it is decoded."
    )
    prompt_characters: Many = option(2000, "Longest prompt.")
    recording_bytes: Bytes = option(512 * 2**20, "Largest recording.")
    snapshot_bytes: Bytes = option(2**30, "Memory for snapshots; older ones are removed.")

    def __post_init__(self) -> None:
        require(
            self.is_local or bool(self.token),
            f"--host is {self.host}, which others can reach; give --token, or listen at 127.0.0.1",
        )
        require(not self.token or len(self.token) >= 16, "--token is too short; accepted: 16 characters or more")
        require(
            all(c.isascii() and (c.isalnum() or c in "-_.~") for c in self.token),
            "--token has characters other than letters, digits and -_.~",
        )
        check_bounds(self)

    def check_prompt(self, prompt: str) -> None:
        """Refuse a prompt that is empty or too long.

        Raises:
            ConfigError: with the limit.
        """
        most = self.prompt_characters
        require(bool(prompt.strip()), "the prompt is empty; say what to show")
        require(len(prompt) <= most, f"the prompt has {len(prompt)} characters; accepted: {most}")

    @property
    def is_local(self) -> bool:
        """Whether only this machine can connect."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
