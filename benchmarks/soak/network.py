"""A network namespace for Redis: a network that loses every packet, which a closed connection does not show."""

from __future__ import annotations

import os
import subprocess
from contextlib import ExitStack
from pathlib import Path

NEAR, FAR = "10.213.7.1", "10.213.7.2"


class Namespace:
    """Where there is no right to make one, :attr:`is_there` is False and nothing else is to be used."""

    def __init__(self, running: ExitStack) -> None:
        self.name = f"soak-{os.getpid()}"
        ends = f"sk{os.getpid()}a", f"sk{os.getpid()}b"
        self.is_there = _ip("netns", "add", self.name)
        if self.is_there:
            running.callback(_ip, "netns", "del", self.name)
            inside = ("-n", self.name)
            self.is_there = all(
                (
                    _ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1], "netns", self.name),
                    _ip("addr", "add", f"{NEAR}/30", "dev", ends[0]),
                    _ip("link", "set", ends[0], "up"),
                    _ip(*inside, "addr", "add", f"{FAR}/30", "dev", ends[1]),
                    _ip(*inside, "link", "set", ends[1], "up"),
                    _ip(*inside, "link", "set", "lo", "up"),
                )
            )

    def program(self, folder: Path, name: str) -> str:
        """``name`` as a program that runs inside."""
        script = folder / f"{name}-inside"
        script.write_text(f'#!/bin/sh\nexec ip netns exec {self.name} {name} "$@"\n')
        script.chmod(0o755)
        return str(script)

    def lose_packets(self) -> None:
        """What comes from inside is lost, without a word to either side."""
        _ip("-n", self.name, "route", "add", "blackhole", f"{NEAR}/32")

    def deliver_packets(self) -> None:
        _ip("-n", self.name, "route", "del", "blackhole", f"{NEAR}/32")


def _ip(*arguments: str) -> bool:
    try:
        return subprocess.run(["ip", *arguments], capture_output=True, check=False).returncode == 0
    except OSError:
        return False
