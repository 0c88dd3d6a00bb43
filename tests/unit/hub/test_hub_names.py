"""Names that a server sent."""

from __future__ import annotations

import pytest

from flagai_altdiff.errors import HubError
from flagai_altdiff.hub.names import safe_name, safe_names

REFUSED = {
    "parent": "../config.yaml",
    "parent inside": "unet/../../x",
    "absolute": "/etc/passwd",
    "empty": "",
    "empty part": "unet//x",
    "dot": "./x",
    "drive": "C:x",
    "unc": "\\\\host\\share",
    "backslash": "..\\x",
    "nul": "config.yaml\0.png",
    "newline": "config\n.yaml",
    "escape": "\x1b[2Jx",
    "right to left": "model\u202etpkc.",
    "surrogate": "\ud800",
    "line separator": "a\u2028b",
    "device": "NUL",
    "device with suffix": "com1.ckpt",
    "device with space": "aux .txt",
    "trailing dot": "model.ckpt.",
    "trailing space": "unet /x",
    "leading space": " x",
    "long": "x" * 300,
    "long in bytes": "图" * 90,
    "full width": "\uff4dodel.ckpt",
    "wildcard": "*.ckpt",
    "own partial": "model.ckpt.part",
    "own state": "model.ckpt.part.json",
    "own folder": ".incoming-baai/x",
}


@pytest.mark.parametrize(
    "name", ["model.ckpt", "unet/config.json", ".gitattributes", "说明 1.md", "a..b", "console.log"]
)
def test_ordinary_names_are_kept(name: str) -> None:
    assert str(safe_name(name)) == name


@pytest.mark.fault(21)
@pytest.mark.parametrize("name", REFUSED.values(), ids=list(REFUSED))
def test_dangerous_names_are_refused_and_shown_escaped(name: str) -> None:
    with pytest.raises(HubError) as caught:
        safe_name(name)
    assert ascii(name[:300]) in str(caught.value)
    assert str(caught.value).isprintable() and str(caught.value).isascii()


@pytest.mark.fault(21)
@pytest.mark.parametrize(
    "names", [("a.ckpt", "A.ckpt"), ("unet/x", "UNet/X"), ("é", "É"), ("vae", "vae/x"), ("vae", "VAE/x/y")]
)
def test_names_that_collide_on_some_file_system_are_refused(names: tuple[str, str]) -> None:
    with pytest.raises(HubError):
        safe_names(names)


def test_names_in_one_folder_do_not_collide() -> None:
    assert [str(path) for path in safe_names(["unet/a", "unet/b", "a", "b", "a"])] == [
        "unet/a",
        "unet/b",
        "a",
        "b",
        "a",
    ]
