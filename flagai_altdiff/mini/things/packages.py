"""The packages that pictures and words come from: fetched with npm, each only with the content that it must have."""

from __future__ import annotations

import base64
import hashlib
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flagai_altdiff.errors import DataError, MissingDependencyError, printable
from flagai_altdiff.files import open_regular

_PATIENCE_S = 600


@dataclass(frozen=True, kw_only=True)
class Package:
    """An archive of npm's.

    Args:
        name: With its scope.
        version: Exactly this one.
        sha512: Of the archive, in base64, as npm tells it.
        about: What is in it, whose it is, and its licence.
    """

    name: str
    version: str
    sha512: str
    about: str

    @property
    def archive(self) -> str:
        """Name of the file, as ``npm pack`` calls it."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


SOLID = Package(
    name="@lobehub/fluent-emoji-3d",
    version="1.1.0",
    sha512="Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
    about="Fluent Emoji, modelled; Microsoft; MIT",
)
FLAT = Package(
    name="@iconify-json/fluent-emoji-flat",
    version="1.2.6",
    sha512="RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
    about="Fluent Emoji, flat; Microsoft; MIT",
)
NOTO = Package(
    name="@iconify-json/noto",
    version="1.2.9",
    sha512="DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
    about="Noto Emoji; Google; Apache-2.0",
)
NAMES = Package(
    name="cldr-annotations-full",
    version="48.2.0",
    sha512="DV7A+rEcgUSNTRsVGNGqBZRmAkGfwhGHO5Q1dRwzBoBnVrHWp804JP7/QJdEc66iHmx3+zLWVIMCFLm0lW7PUQ==",
    about="names and keywords; Unicode CLDR; Unicode-3.0",
)
FURTHER_NAMES = Package(
    name="cldr-annotations-derived-full",
    version="48.2.0",
    sha512="log62km+AOzI7n/NEuNNFV0mg9DWnt67EYCh1RwxZq9dyRuyteB586LT83Ke8TchEfnwI9cIk2P31zO4nTvZmw==",
    about="names that follow from others; Unicode CLDR; Unicode-3.0",
)
PACKAGES = (SOLID, FLAT, NOTO, NAMES, FURTHER_NAMES)


def fetch(folder: Path) -> dict[Package, Path]:
    """Have all archives in a folder; one that lies there already is not fetched again.

    Args:
        folder: Made if it is missing.

    Raises:
        MissingDependencyError: An archive is missing, and there is no npm to fetch it.
        DataError: npm cannot fetch one, or one has another content than it must have.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for package in PACKAGES:
        path = folder / package.archive
        if not path.is_file():
            _pack(package, folder)
        _check(package, path)
    return {package: folder / package.archive for package in PACKAGES}


def members(archive: Path, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """Files of a checked archive.

    Args:
        archive: From :func:`fetch`.
        wanted: Name within the package -> whether to read it.
    """
    found = {}
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            name = member.name.partition("/")[2]
            if member.isfile() and wanted(name) and (file := tar.extractfile(member)) is not None:
                found[name] = file.read()
    return found


def _pack(package: Package, folder: Path) -> None:
    npm = shutil.which("npm")
    what = f"{package.name}@{package.version}"
    if npm is None:
        raise MissingDependencyError(
            f"{folder / package.archive} is missing, and there is no npm to fetch it. Install Node.js, or bring the "
            f"archive from elsewhere: npm pack {what}"
        )
    words = [npm, "pack", "--silent", "--ignore-scripts", "--pack-destination", str(folder), what]
    try:
        done = subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=_PATIENCE_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise DataError(f"npm has not fetched {what} in {_PATIENCE_S} s. Try again later.") from error
    if done.returncode or not (folder / package.archive).is_file():
        reason = next((line for line in done.stderr.splitlines() if line.strip()), "it said nothing")
        raise DataError(f"npm cannot fetch {what}: {printable(reason, 200)}. Is the network there?")


def _check(package: Package, path: Path) -> None:
    try:
        with open_regular(path) as file:
            found = base64.b64encode(hashlib.file_digest(file, "sha512").digest()).decode()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    if found != package.sha512:
        raise DataError(
            f"{path} is not {package.name} {package.version}: expected SHA-512 {package.sha512}, found {found}. "
            "Remove it, and try again."
        )
