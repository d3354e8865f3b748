"""A compiler command for CuTe-DSL sources: kernels in Python -> a shared object with a C ABI.

    python -m dsv4_bench.engine.dsl.compile --nvcc NVCC [--kernel NAME] -o OUT.so SOURCE.py [HELPER.py ...]
    python -m dsv4_bench.engine.dsl.compile --nvcc NVCC --version
    python -m dsv4_bench.engine.dsl.compile -c SOURCE.py [HELPER.py ...]     objects, without nvcc
    python -m dsv4_bench.engine.dsl.compile --serve      many of these, with the DSL imported once

Helpers are what SOURCE.py imports from this package; these files are used, not the installed ones.
SOURCE.py has a generator `exports()`: name, host function, example arguments. Each, or NAME alone, becomes
`int dsv4_<name>(arguments..., void* stream)`, status 0 or a cudaError_t. The DSL compiles and writes
object files; the host compiler, through nvcc for its paths, adds the functions that load the kernels at
their first call. Needs nvidia-cutlass-dsl and nvcc, no GPU. What ptxas says about every kernel is printed.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

ARCH = "sm_90a"
_WRAPPER = re.compile(r"cute_dsl_(\w+)_wrapper\(\1_Kernel_Module_t \*module, (.*?)\) \{")

_HEAD = """\
#include <cuda_runtime.h>
#define DSV4_EXPORT extern "C" __attribute__((visibility("default")))
DSV4_EXPORT const char* dsv4_error_string(int status) {
    return cudaGetErrorString((cudaError_t)status);
}
"""
_EXPORT = """\
#include "{name}.h"
DSV4_EXPORT int dsv4_{name}({parameters}) {{
    static {name}_Kernel_Module_t kernels;
    static const bool loaded = ({name}_Kernel_Module_Load(&kernels), true);
    return loaded ? cute_dsl_{name}_wrapper(&kernels, {arguments}) : -1;
}}
"""


def glue(name: str, header: str) -> str:
    """The exported C function of `name`, from the header that the DSL wrote."""
    found = _WRAPPER.search(header)
    if found is None or found.group(1) != name:
        raise SystemExit(f"error: the DSL's header of {name} has no wrapper:\n{header}")
    parameters = found.group(2)
    arguments = ", ".join(re.split(r"[ *]+", part)[-1] for part in parameters.split(","))
    return _EXPORT.format(name=name, parameters=parameters, arguments=arguments)


def load(source: Path) -> Any:
    """The module in `source`, under the name it has in this package."""
    name = f"{__package__ or 'dsv4_bench.engine.dsl'}.{source.stem}"
    spec = importlib.util.spec_from_file_location(name, source)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # for imports, and the DSL looks functions up in their module
    spec.loader.exec_module(module)
    return module


def the_dsl() -> Any:
    """The module cutlass.cute, set to compile for `ARCH`."""
    # It reads these when it is imported, and knows no other way to compile for an absent GPU.
    os.environ.update(
        CUTE_DSL_ARCH=ARCH, CUTE_DSL_COMPILER_OPT="remarks{ptx}", CUTE_DSL_DISABLE_FILE_CACHING="1"
    )
    import cutlass.cute as cute

    return cute


def compile_exports(source: Path, helpers: list[Path], wanted: str | None = None) -> list[str]:
    """Write <name>.o and <name>.h into the current folder for each export, or `wanted`; their names."""
    cute = the_dsl()
    for helper in helpers:
        load(helper)
    names = []
    for name, function, arguments in load(source).exports():
        if name != (wanted or name):
            continue
        compiled = cute.compile(function, *arguments)
        compiled.export_to_c(file_path=".", file_name=name, function_prefix=name)
        names.append(name)
    if not names:
        raise SystemExit(f"error: {source.name} exports no {wanted or 'kernel'}")
    return names


def runtime() -> Path:
    """The static library that the DSL's object files call."""
    name = "libcuda_dialect_runtime_static.a"
    files = [file for package in packages() for file in metadata.files(package) or ()]
    found = [Path(str(file.locate())) for file in files if file.name == name]
    if not found:
        raise SystemExit(f"error: cannot find {name} among the files of {', '.join(packages())}")
    return found[0]


def packages() -> list[str]:
    """The DSL's installed distributions."""
    names = (str(d.metadata["Name"]) for d in metadata.distributions())
    return sorted({name for name in names if name.startswith("nvidia-cutlass-dsl")})


def versions(nvcc: str) -> str:
    """Everything that decides what comes out."""
    done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True)
    own = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    return "\n".join([*(f"{p} {metadata.version(p)}" for p in packages()), own, done.stdout])


def serve() -> int:
    """Do what lines of standard input ask for, each in a fork of this process, until they end.

    A line is JSON: `words` as on the command line, the `folder` to run in. What is said goes into the
    folder's build.log, the exit code to standard output.
    """
    the_dsl()
    for source in sorted(Path(__file__).parent.glob("*_sm90.py")):
        load(source)  # for what it imports; a job reads its own copy
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            os.chdir(job["folder"])
            os.environ["TMPDIR"] = job["folder"]
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(os.open("build.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
            os.dup2(1, 2)
            return run(job["words"])
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    return 0


def run(words: list[str] | None = None) -> int:
    """The command with the arguments `words` (default: this process's)."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--nvcc")
    parser.add_argument("--version", action="store_true")
    parser.add_argument("--serve", action="store_true")
    parser.add_argument("-c", dest="objects_only", action="store_true")
    parser.add_argument("--kernel")
    parser.add_argument("-o", dest="output", type=Path)
    parser.add_argument("source", type=Path, nargs="?")
    parser.add_argument("helpers", type=Path, nargs="*")
    args = parser.parse_args(words)
    if args.serve:
        return serve()
    if args.nvcc is None and not args.objects_only:
        parser.error("--nvcc is needed")
    if args.version:
        print(versions(args.nvcc))
        return 0
    if args.source is None or (args.output is None and not args.objects_only):
        parser.error("a source and -o are needed")
    names = compile_exports(args.source, args.helpers, args.kernel)
    if args.objects_only:
        return 0
    Path("glue.cpp").write_text(  # not .cu: for that nvcc would compile a GPU's half too
        _HEAD + "".join(glue(name, Path(f"{name}.h").read_text()) for name in names)
    )
    objects = [f"{name}.o" for name in names]
    flags = ["--shared", "-Xcompiler=-fPIC,-fvisibility=hidden", "--cudart=static", "-std=c++17"]
    command = [args.nvcc, *flags, "-o", str(args.output), "glue.cpp", *objects, str(runtime())]
    return subprocess.run(command).returncode


if __name__ == "__main__":
    sys.exit(run())
