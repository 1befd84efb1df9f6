"""What makes the code that a configuration is found right with: the kernels' source, Triton, ptxas and torch."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import re
import subprocess
import tokenize
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

_SOURCES = ("gates", "prepare", "scan", "states", "gradients", "pairs", "slots", "problem", "forward", "backward")
_LAYOUT = (tokenize.COMMENT, tokenize.NL, tokenize.ENCODING, tokenize.ENDMARKER)


class Versions(NamedTuple):
    """What made the code that was found right."""

    kernels: str  # `source_hash`
    triton: str
    ptxas: str
    torch: str  # major.minor


@functools.cache
def installed_versions(compute_capability: str) -> Versions:
    """Of the kernels here and of what compiles them; "none" where something is absent."""
    torch = metadata.version("torch").split(".")
    return Versions(source_hash(), _version("triton"), ptxas_version(compute_capability), ".".join(torch[:2]))


def _version(package: str) -> str:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return "none"


def ptxas_version(compute_capability: str) -> str:
    """Of the assembler that Triton calls for a GPU, such as 12.8.93; "none" where it cannot be found."""
    try:
        from triton.backends.nvidia import compiler

        try:
            tool = compiler.get_ptxas(int(compute_capability.replace(".", "")))
        except TypeError:  # Triton 3.4 and before take no architecture
            tool = compiler.get_ptxas()
        path = tool[0] if isinstance(tool, tuple) else tool.path
        text = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    except (ImportError, AttributeError, RuntimeError, OSError, subprocess.CalledProcessError):
        return "none"
    release = re.search(r"V(\d+\.\d+\.\d+)", text)
    return release[1] if release else "none"


@functools.cache
def source_hash() -> str:
    """Of the kernels and their launchers: 12 hexadecimal digits. Comments, docstrings and layout do not count."""
    digest = hashlib.sha256()
    for name in _SOURCES:
        digest.update(code_of(Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")).encode())
    return digest.hexdigest()[:12]


def code_of(source: str) -> str:
    """A source text reduced to what is run."""
    words, starts = [], True
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in _LAYOUT or (starts and token.type in (tokenize.STRING, tokenize.NEWLINE)):
            continue  # a docstring, and its end
        names = {tokenize.NEWLINE: "\n", tokenize.INDENT: "{", tokenize.DEDENT: "}"}
        words.append(names.get(token.type, token.string))
        starts = token.type in names
    # Python 3.12 cuts f-strings into tokens, with and without spaces: the same text for all versions.
    return "".join(words).replace(" ", "")
