"""A real ComfyUI, started for a check, and its web API."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from vstar_kernels.methods.llm.endpoint import KEY_VARIABLE

ROOT = Path(__file__).resolve().parents[3]
PACK = ROOT / "integrations" / "comfyui"
TINY = Path(__file__).parent / "tiny"
KEY = "sk-of-the-check"  # in ComfyUI's environment, and to be sent nowhere
ANIMATEDIFF = "ComfyUI-AnimateDiff-Evolved"
# Loader nodes: the input that names a file, and the folder under models/ that has it.
LOADERS = {
    "CheckpointLoaderSimple": ("ckpt_name", "checkpoints"),
    "ImageOnlyCheckpointLoader": ("ckpt_name", "checkpoints"),
    "UNETLoader": ("unet_name", "diffusion_models"),
    "CLIPLoader": ("clip_name", "text_encoders"),
    "VAELoader": ("vae_name", "vae"),
    "ADE_LoadAnimateDiffModel": ("model_name", "animatediff_models"),
}
Prompt = dict[str, dict[str, Any]]  # as POST /prompt takes it: nodes by id


class FailedError(RuntimeError):
    """A prompt that ComfyUI refused, or that failed as it ran; the message is what users see."""


class Server:
    """A ComfyUI with a folder of its own for models, node packs and results, until it is closed."""

    def __init__(self, comfyui: Path, folder: Path, log: Path) -> None:
        self.comfyui, self.folder, self.log = comfyui, folder, log
        packs = folder / "custom_nodes"
        packs.mkdir(parents=True)
        self.pack = "vstar"
        (packs / self.pack).symlink_to(PACK)
        (packs / "vstar_tiny").symlink_to(TINY)
        animatediff = comfyui / "custom_nodes" / ANIMATEDIFF
        self.has_animatediff = animatediff.is_dir()
        if self.has_animatediff:
            (packs / ANIMATEDIFF).symlink_to(animatediff)
        for name in (
            "input",
            "output",
            "temp",
            "user",
            *(f"models/{f}" for _, f in LOADERS.values()),
        ):
            (folder / name).mkdir(parents=True, exist_ok=True)
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            self.port = sock.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Server:
        options = ("--cpu", "--port", str(self.port), "--disable-auto-launch", "--disable-metadata")
        command = [sys.executable, "main.py", *options, "--base-directory", str(self.folder)]
        command += os.environ.get("COMFYUI_OPTIONS", "").split()
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        # Threads only wait for each other in models as small as these.
        environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": path, KEY_VARIABLE: KEY}
        environment["PYTHONUNBUFFERED"] = "1"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, cwd=self.comfyui, env=environment, stdout=log, stderr=log
            )
        for _ in range(600):
            if self.process.poll() is not None:
                raise RuntimeError(f"ComfyUI ended at its start:\n{self.tail()}")
            try:
                self.get("/system_stats")
                return self
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.2)
        self.__exit__()
        raise RuntimeError(f"ComfyUI did not answer within two minutes:\n{self.tail()}")

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(30)

    def tail(self, lines: int = 30) -> str:
        """Returns the last lines of ComfyUI's log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def read(self, path: str) -> bytes:
        """Returns what the server answers."""
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return bytes(answer.read())

    def get(self, path: str) -> Any:
        """Returns what the API answers, decoded."""
        return json.loads(self.read(path))

    def post(self, path: str, value: Any) -> bytes:
        """Sends a value to the API and returns the answer."""
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, json.dumps(value).encode(), headers)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return bytes(answer.read())

    def placeholders(self, files: Iterable[tuple[str, str]]) -> None:
        """Makes a file of no bytes in each folder of models: the test pack's tiny models."""
        for folder, name in files:
            (self.folder / "models" / folder / name).touch()

    def media(self, names: Iterable[str]) -> None:
        """Makes pictures and videos in the folder that they are loaded from."""
        import av

        picture = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
        for name in names:
            path = self.folder / "input" / name
            if path.suffix != ".mp4":
                picture.save(path)
                continue
            with av.open(str(path), "w") as video:
                stream = video.add_stream("libx264", rate=8)
                stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
                frames = (picture.rotate(9 * turn) for turn in range(24))
                for image in (*map(av.VideoFrame.from_image, frames), None):
                    for packet in stream.encode(image):
                        video.mux(packet)

    def run(self, prompt: Prompt, *, timeout: float = 300) -> dict[str, Any]:
        """Runs a prompt and returns the outputs of its nodes by id; raises :class:`FailedError`."""
        try:
            number = json.loads(self.post("/prompt", {"prompt": prompt}))["prompt_id"]
        except urllib.error.HTTPError as error:
            raise FailedError(refusal(json.load(error))) from None
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            job = self.get(f"/history/{number}").get(number)
            if job and job["status"]["completed"]:
                return dict(job["outputs"])
            if job:
                raise FailedError(failure(job["status"]["messages"]))
            if self.process.poll() is not None:
                raise RuntimeError(f"ComfyUI ended:\n{self.tail()}")
            time.sleep(0.05)
        raise RuntimeError(f"a prompt took more than {timeout} s:\n{self.tail()}")

    def latents(self, outputs: Mapping[str, Any], node: str) -> Tensor:
        """Returns what a SaveLatent node wrote, frames first."""
        return load_file(self.saved(outputs, node, "latents")[0])["latent_tensor"]

    def saved(self, outputs: Mapping[str, Any], node: str, kind: str = "images") -> list[Path]:
        """Returns the files that a node wrote."""
        return [
            self.folder / file["type"] / file["subfolder"] / file["filename"]
            for file in outputs[node][kind]
        ]


def refusal(answer: Mapping[str, Any]) -> str:
    """Returns why a prompt was refused before it ran."""
    errors = [e for node in answer.get("node_errors", {}).values() for e in node["errors"]]
    errors = errors or [answer["error"]]
    return "; ".join(f"{error['message']}: {error.get('details', '')}" for error in errors)


def failure(messages: Iterable[tuple[str, Mapping[str, Any]]]) -> str:
    """Returns the error with which a prompt failed as it ran."""
    for name, message in messages:
        if name == "execution_error":
            return f"{message['node_type']}: {message['exception_message'].strip()}"
    return "it was interrupted"
