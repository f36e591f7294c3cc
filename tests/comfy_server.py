"""A real ComfyUI server with this pack in its custom_nodes/, driven through its HTTP interface."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from registry_archive import PACK, archived

from autorefiner.refiner.demo import bundle

START_SECONDS, RUN_SECONDS = 600, 600  # seconds, for a slow machine


def find_comfyui() -> tuple[Path, Path] | None:
    """Return ComfyUI's (checkout, interpreter) from the environment or the usual places."""
    named = [Path(os.environ["COMFYUI_PATH"])] if os.environ.get("COMFYUI_PATH") else []
    for path in (*named, Path.home() / "ComfyUI", Path.home() / "comfy" / "ComfyUI"):
        pythons = [
            os.environ.get("COMFYUI_PYTHON"),
            path / ".venv/bin/python",
            path / ".venv/Scripts/python.exe",
        ]
        python = next(
            (Path(python) for python in pythons if python and Path(python).is_file()), None
        )
        if (path / "main.py").is_file() and python is not None:
            return path, python
    return None


def install_pack(base: Path, weights: Path) -> None:
    """Copy what the registry packs into custom_nodes/, with these files as its bundle."""
    pack = base / "custom_nodes" / "autorefiner"
    for path in archived():
        (pack / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(PACK / path, pack / path)
    own = pack / bundle.WEIGHTS.relative_to(PACK)
    shutil.rmtree(own, ignore_errors=True)
    shutil.copytree(weights, own)


class Refused(Exception):
    """The server's answer to a prompt that it refuses."""

    def __init__(self, answer: dict) -> None:
        super().__init__(json.dumps(answer)[:2000])
        self.answer = answer


@dataclass(slots=True)
class Server:
    """A running server; `base` holds its models, input, output and custom_nodes."""

    base: Path
    port: int
    process: subprocess.Popen
    client: str = field(default_factory=lambda: uuid.uuid4().hex)

    @classmethod
    def start(
        cls,
        comfyui: Path,
        python: Path,
        base: Path,
        options: Sequence[str] = ("--disable-api-nodes",),
    ) -> "Server":
        """Start ComfyUI on the CPU and wait until it answers."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for name in ("models", "input", "output", "temp", "user"):
            (base / name).mkdir(exist_ok=True)
        arguments = [
            "--cpu",
            *options,
            "--port",
            str(port),
            "--base-directory",
            str(base),
        ]
        arguments += ["--database-url", f"sqlite:///{base / 'user.db'}", "--disable-auto-launch"]
        command = [
            str(python),
            str(Path(__file__).with_name("comfy") / "launch.py"),
            str(comfyui),
            *arguments,
        ]
        log = open(base / "comfyui.log", "wb")  # noqa: SIM115, the process writes it
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=comfyui)
        server = cls(base, port, process)
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and process.poll() is None:
            try:
                server.get("/queue")
                return server
            except OSError:
                time.sleep(0.5)
        server.stop()
        raise RuntimeError(f"ComfyUI did not start: {server.log()[-3000:]}")

    def stop(self) -> None:
        """Stop the process."""
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def log(self) -> str:
        """Return what the server printed."""
        return (self.base / "comfyui.log").read_text(errors="replace")

    def resident_bytes(self) -> int:
        """Return the memory that the process holds (Linux)."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
        return int(line.split()[1]) << 10

    def get(self, path: str) -> dict:
        """Return a JSON answer."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=120) as answer:
            return json.loads(answer.read())

    def post(self, path: str, body: dict) -> dict:
        """Return the JSON answer to a POST; raise Refused if it is an error."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return json.loads(answer.read() or b"{}")
        except urllib.error.HTTPError as error:
            raise Refused(json.loads(error.read())) from None

    def queue(self, graph: dict, **extra: object) -> str:
        """Queue a graph and return its prompt id; `extra` is the prompt's extra_data."""
        body = {"prompt": graph, "client_id": self.client, "extra_data": extra}
        return self.post("/prompt", body)["prompt_id"]

    def wait(self, prompt: str) -> dict:
        """Wait until a prompt has ended; return its history."""
        end = time.monotonic() + RUN_SECONDS
        while time.monotonic() < end:
            found = self.get(f"/history/{prompt}").get(prompt)
            if found and found["status"]["messages"][-1][0] not in (
                "execution_start",
                "execution_cached",
            ):
                return found
            if self.process.poll() is not None:
                break
            time.sleep(0.1)
        raise RuntimeError(f"the prompt did not end: {self.log()[-3000:]}")

    def run(self, graph: dict) -> dict:
        """Run a graph that must succeed; return its history."""
        ended = self.wait(self.queue(graph))
        assert ended["status"]["status_str"] == "success", json.dumps(ended["status"])[:3000]
        return ended

    def error(self, graph: dict) -> dict:
        """Run a graph that must fail; return its `execution_error`."""
        ended = self.wait(self.queue(graph))
        return next(
            data for event, data in ended["status"]["messages"] if event == "execution_error"
        )


if __name__ == "__main__":  # an interactive server: python tests/comfy_server.py FOLDER WEIGHTS
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    install_pack(folder, Path(sys.argv[2]))
    server = Server.start(*find_comfyui(), folder)
    print(f"http://127.0.0.1:{server.port}")
    server.process.wait()
