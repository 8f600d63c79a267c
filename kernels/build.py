"""Builds a C++ file at its first use, and loads it.

A library is plain C with PyTorch's thread pool, so that it compiles in seconds. It is kept in `$INVOLUTION_CACHE`
(default: `$XDG_CACHE_HOME/darts_involution` or `~/.cache/darts_involution`) under a name that holds the source, the
compiler, PyTorch's version and every feature of the processor it was compiled for: a cache shared between machines
never runs the code of another one. The compiler is `$CXX`, or the first of c++, g++, clang++.
"""

import ctypes
import functools
import glob
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

FLAGS = ["-O3", "-march=native", "-fno-math-errno", "-std=c++17", "-fopenmp", "-fPIC", "-shared"]


class BuildError(RuntimeError):
    """The library cannot be built or loaded here; the message says why, in one line."""


@functools.cache
def library(source):
    """Return the loaded library of a C++ file, building it first where the cache has none. Raises BuildError."""
    try:
        import fcntl  # not on Windows, whose compiler lacks the vector types of the source too

        compiler = _compiler()
        path = _cache_folder() / f"{source.stem}-{_key(compiler, source)}.so"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path.with_suffix(".lock"), "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # of processes that start at once, one builds
                if not path.exists():
                    _build(compiler, path, source)
        return ctypes.CDLL(str(path))
    except (ImportError, OSError) as error:
        raise BuildError(f"{type(error).__name__}: {error}") from error


def _cache_folder():
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "darts_involution"
    return Path(os.environ.get("INVOLUTION_CACHE") or default).resolve()  # the loader looks elsewhere for a bare name


def _compiler():
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise BuildError("no C++ compiler found (looked for $CXX, c++, g++, clang++)")


def _with_flags(compiler):
    return [compiler[0], *FLAGS, *compiler[1:]]  # the flags in $CXX, which come later, have the last word


def _key(compiler, source):
    # the predefined macros name the compiler's version and every instruction set that it may use
    macros = _run([*_with_flags(compiler), "-dM", "-E", "-x", "c++", os.devnull])
    texts = [path.read_text() for path in (source, *sorted(source.parent.glob("*.h")))]
    parts = (*texts, macros, torch.__version__, " ".join(compiler + FLAGS))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def _build(compiler, path, source):
    root = Path(torch.__file__).parent
    # PyTorch's own OpenMP runtime first: a second one would be a second pool of threads
    openmp = glob.glob(str(root / "lib" / "libgomp*")) + glob.glob(str(root.parent / "torch.libs" / "libgomp*"))
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # whose file gets the permissions of any new one
        temporary = os.path.join(folder, path.name)
        _run(
            [*_with_flags(compiler), f"-I{root / 'include'}", str(source), "-o", temporary]
            + ["-Wl,--as-needed", *openmp, f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"]
        )
        os.replace(temporary, path)


def _run(command):
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except FileNotFoundError as error:
        raise BuildError(f"the compiler {command[0]!r} cannot be run") from error
    except subprocess.CalledProcessError as error:
        lines = error.stderr.splitlines()
        # the linker's own words come before the compiler's "error: ld returned 1 exit status"
        lines = [line for line in lines if re.search("error|cannot find|undefined reference", line)] or lines
        raise BuildError(f"{command[0]} failed: {lines[0] if lines else error}") from error
