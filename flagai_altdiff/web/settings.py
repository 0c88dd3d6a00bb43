"""What a server is told when it starts."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from flagai_altdiff.errors import InvalidRequestError
from flagai_altdiff.registry import DEFAULT_MODEL_DIR, find_model

MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """What a process that draws must know.

    Args:
        models: Names or paths; the first one draws where a request names none.
        model_dir: Folder of the model folders.
        threads: Of one process on a CPU; 0 leaves them to torch.
        half: Half precision on a GPU.
        memory: How much drawing may take, as of ``load_model``.
        safety_checker: As of ``load_model``.
        loras: Files that requests may name, by their stem.
        embeddings: Files of learnt words, added to every model.
        vae: File or folder of another autoencoder.
        quantize: As of ``load_model``; not beside LoRAs, which change weights.
        max_memory: Bytes of weights that a process keeps; ``None`` is half of what it has of its device's memory.
        sharers: Processes that share the memory of a device.
        folder: Where images are saved; ``None`` saves none.
    """

    models: tuple[str, ...] = ("AltDiffusion-mini",)
    model_dir: Path = DEFAULT_MODEL_DIR
    threads: int = 0
    half: bool = False
    memory: str = "auto"
    safety_checker: bool | str = "auto"
    loras: tuple[Path, ...] = ()
    embeddings: tuple[Path, ...] = ()
    vae: Path | None = None
    quantize: str | None = None
    max_memory: int | None = None
    sharers: int = 1
    folder: Path | None = Path("AltDiffusionOutputs")

    @property
    def names(self) -> dict[str, str]:
        """What requests call the models → what they were named by; of a path, no more than its end is told.

        Raises:
            InvalidRequestError: Two would have one name.
        """
        names = {spec.name if (spec := find_model(typed)) else Path(typed).name: typed for typed in self.models}
        if len(names) < len(self.models):
            raise InvalidRequestError("--models", ",".join(self.models), "expected models of different names")
        return names


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What is refused, and what is waited for.

    Args:
        waiting: Jobs that may wait.
        waiting_each: Jobs of one client that may wait.
        work: Pixels x steps x images of a request; each chunk of a prompt beyond the first counts as a step, a pixel in
            each window that it lies in.
        chunks: Of 75 tokens, that a prompt with weights may have.
        batch: Images of several requests that are drawn at once.
        body_bytes: Size of a request.
        picture_pixels: Pixels of a picture in a request, with what is drawn around it.
        grace_s: Seconds that a job which was begun has when the server is told to stop.
        idle_s: Seconds after which a connection that says nothing is closed.
    """

    waiting: int = 64
    waiting_each: int = 16
    work: int = 2_000_000_000
    chunks: int = 20
    batch: int = 8
    body_bytes: int = 32 * MIB
    picture_pixels: int = 1 << 24
    grace_s: float = 30.0
    idle_s: float = 10.0


@dataclass(frozen=True, kw_only=True)
class Access:
    """Who is let in.

    Args:
        api_keys: Any of them opens every door.
        users: Pairs of a name and a password.
        hosts: Names under which the server may be asked for, beside its address and localhost; ``*`` is any.
        origins: Pages of other addresses that may use the server.
        picture_urls: Whether pictures may be named by an address on the web.
    """

    api_keys: tuple[str, ...] = field(default=(), repr=False)
    users: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    picture_urls: bool = False

    @property
    def is_open(self) -> bool:
        """Whether anybody is let in."""
        return not self.api_keys and not self.users


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All of it.

    Args:
        host: Address to listen at.
        port: 0 takes a free one.
        name: Begins the id of every job, so that a load balancer finds the server that has it.
        devices: One process for each; ``auto`` is a GPU where there is one, else the CPU.
        drawing: For these processes.
        limits: See :class:`Limits`.
        access: See :class:`Access`.
        page: Whether there is a page for people.
    """

    host: str = "127.0.0.1"
    port: int = 7860
    name: str = ""
    devices: tuple[str, ...] = ("auto",)
    drawing: Drawing = Drawing()
    limits: Limits = Limits()
    access: Access = Access()
    page: bool = True
