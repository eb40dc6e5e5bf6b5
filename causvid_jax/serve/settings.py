"""Limits and times of the server; the fields are the flags of ``causvid serve``."""

import dataclasses
import ipaddress

from causvid_jax.config import require
from causvid_jax.config.recipes import option


@dataclasses.dataclass(frozen=True)
class Settings:
    """How many, how long and how large.

    Raises:
        ConfigError: a value out of bounds.
    """

    host: str = option("127.0.0.1", "Address to listen at. Any other than loopback needs --token.")
    port: int = option(8000, "Port to listen at; 0 takes a free one.")
    token: str = option("", "Secret that clients must give; also read from CAUSVID_TOKEN.")
    origin: tuple[str, ...] = option((), "Another origin whose pages may connect, such as https://example.org.")
    recordings: str = option("recordings", "Directory for recordings and finished jobs.")
    sessions: int = option(4, "Films that run at the same time; further ones wait in a queue.")
    queue: int = option(16, "Most sessions that wait.")
    per_address: int = option(8, "Most sessions of one address.")
    requests_per_minute: int = option(600, "Most requests and connections of one address in a minute.")
    jobs: int = option(16, "Most videos of /v1/videos that wait.")
    kept: int = option(64, "Most finished videos and recordings that are kept; older ones are removed.")
    ahead: int = option(3, "Most blocks that are kept for a player that has not confirmed them.")
    idle_seconds: float = option(120.0, "A session that sends nothing for so long ends.")
    resume_seconds: float = option(60.0, "How long a lost connection can be taken up again.")
    seconds: float = option(20.0, "Most seconds of one video of /v1/videos.")
    upload_bytes: int = option(32 * 2**20, "Largest upload.")
    message_bytes: int = option(4 * 2**20, "Largest message on a WebSocket.")
    picture_pixels: int = option(2**24, "Largest picture, checked before it is decoded.")
    prompt_characters: int = option(2000, "Longest prompt.")
    recording_bytes: int = option(512 * 2**20, "Largest recording.")
    snapshot_bytes: int = option(2**30, "Memory for snapshots; older ones are removed.")

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
        require(0 <= self.port < 65536, f"--port is {self.port}; accepted: 0 to 65535")
        for name in ("sessions", "per_address", "requests_per_minute", "ahead", "jobs", "kept"):
            require(getattr(self, name) >= 1, f"--{name} is {getattr(self, name)}; accepted: from 1")
        require(self.queue >= 0, f"--queue is {self.queue}; accepted: from 0")
        for name in ("idle_seconds", "resume_seconds", "seconds"):
            require(getattr(self, name) > 0, f"--{name} is {getattr(self, name)}; accepted: above 0")

    @property
    def is_local(self) -> bool:
        """Whether only this machine can connect."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
