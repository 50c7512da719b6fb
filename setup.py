"""Builds the operator library of paddle_fused_attention for the Paddle that is installed.

The library is the one file paddle_fused_attention/_C.so, made of custom_ops/core and custom_ops/op, with their cuda
parts where Paddle is built with CUDA. The build writes what it was built for to paddle_fused_attention/_build_info.py,
which the package compares with the Paddle that it finds at import, and what the package consists of and needs to
paddle_fused_attention/bill_of_materials.cdx.json, in CycloneDX's format.

Environment: CXX, CXXFLAGS, LDFLAGS; MAX_JOBS, the number of compilers to run at once (default: one per core);
CUDA_HOME; PADDLE_CUDA_ARCH_LIST, such as "8.0;9.0a+PTX" (default: the cards that are visible).
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from importlib.util import find_spec
from pathlib import Path

# Without build isolation pip sees to none of these.
try:
    import setuptools
except ModuleNotFoundError:
    raise SystemExit("setuptools 62 or later is needed: pip install -U setuptools wheel") from None
else:
    SETUPTOOLS_VERSION = tuple(map(int, setuptools.__version__.split(".")[:2]))

if SETUPTOOLS_VERSION < (62, 0):  # 61 is the first that reads pyproject.toml, and can't leave the licence to setup()
    raise SystemExit(f"setuptools 62 or later is needed, got {setuptools.__version__}: pip install -U setuptools")
if {"bdist_wheel", "dist_info"}.intersection(sys.argv) and SETUPTOOLS_VERSION < (70, 1) and not find_spec("wheel"):
    raise SystemExit(f"setuptools {setuptools.__version__} makes wheels with the package wheel only: pip install wheel")

from setuptools.command.build_ext import build_ext
from setuptools.errors import PlatformError

PACKAGE = "paddle_fused_attention"
CORE_SOURCES = ["custom_ops/core/cpu/**/*.cc"]
CORE_CUDA_SOURCES = ["custom_ops/core/cuda/**/*.cc", "custom_ops/core/cuda/**/*.cu"]
OPERATOR_SOURCES = ["custom_ops/op/*.cc"]
HEADERS = ["custom_ops/**/*.h", "custom_ops/**/*.cuh"]

# The instruction set is chosen at run time, so none is asked for here. GOMP symbols are found in Paddle's own OpenMP
# runtime, hence -fopenmp for the compiler only.
CXX_FLAGS = ["-std=c++17", "-O3", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-fopenmp", "-ffp-contract=fast"]
NVCC_FLAGS = ["-std=c++17", "-O3", "-DNDEBUG", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
# Paddle's ABI.
DEFINES = ["-D_GLIBCXX_USE_CXX11_ABI=1"]
# The operator uses no Python; without this define Paddle's headers want Python.h.
OPERATOR_DEFINES = ["-DPADDLE_NO_PYTHON"]
# Paddle may bring another CUDA runtime than the nvcc that is used here: ours is linked in and its symbols are kept
# inside.
CUDA_LINK_FLAGS = ["-Wl,--as-needed", "-l:libcudart_static.a", "-ldl", "-lrt", "-lpthread", "-Wl,--exclude-libs,ALL"]


def find(patterns):
    return sorted(path for pattern in patterns for path in glob(pattern, recursive=True))


# How the names of the folders begin where front ends build in isolation, and the command that builds without.
ISOLATION = {
    "pip-build-env-": ("pip", "pip install --no-build-isolation ."),
    "build-env-": ("build", "python -m build --no-isolation"),
    "builds-v": ("uv", "uv pip install --no-build-isolation ."),
}


def import_paddle():
    try:
        import paddle
    except ModuleNotFoundError as error:
        if error.name != "paddle":
            raise
        message = "paddle_fused_attention is compiled for the Paddle that is installed, and"
        folders = Path(setuptools.__file__).parts
        for beginning, (front_end, command) in ISOLATION.items():
            if any(folder.startswith(beginning) for folder in folders):
                pip = "uv pip" if front_end == "uv" else "pip"
                raise PlatformError(
                    f"{message} the isolated build environment of {front_end} hides it. "
                    f"In the environment that has Paddle:\n    {pip} install 'setuptools>=62' wheel\n    {command}"
                ) from None
        raise PlatformError(
            f"{message} none is. Install it, then build without isolation:\n"
            "    pip install paddlepaddle 'setuptools>=62' wheel    (or paddlepaddle-gpu)\n"
            "    pip install --no-build-isolation ."
        ) from None
    return paddle


def find_cxx():
    """The command that compiles C++, a list: CXX may have a launcher or options."""
    cxx = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    if not shutil.which(cxx[0]):
        raise PlatformError(f"The C++ compiler {cxx[0]} is not found: install g++, or set CXX to another.")
    return cxx


def find_cuda_home():
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if not home and os.path.exists("/usr/local/cuda/bin/nvcc"):
        home = "/usr/local/cuda"
    if not home and shutil.which("nvcc"):
        home = str(Path(shutil.which("nvcc")).resolve().parents[1])
    if not home or not os.path.exists(os.path.join(home, "bin", "nvcc")):
        raise PlatformError(
            f"Paddle is built with CUDA, but bin/nvcc is not in {home}: set CUDA_HOME to the CUDA toolkit."
        )
    return home


def cuda_architectures(paddle, requested):
    """Names such as 80, 90a, 90a+PTX."""
    if requested:
        return [name.replace(".", "") for name in re.split(r"[;,\s]+", requested.strip())]
    cards = range(paddle.device.cuda.device_count())
    capabilities = sorted({tuple(paddle.device.cuda.get_device_capability(card)) for card in cards})
    if not capabilities:
        raise PlatformError(
            'No GPU is visible: set PADDLE_CUDA_ARCH_LIST to the architectures to build for, such as "8.0;9.0a".'
        )
    # Hopper's tensor-core instructions exist in the architecture-specific 90a only.
    return [f"{major}{minor}" + ("a" if (major, minor) == (9, 0) else "") for major, minor in capabilities]


def cuda_version(cuda_home):
    """That of the toolkit, of which the runtime library is a part."""
    nvcc = os.path.join(cuda_home, "bin", "nvcc")
    said = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    return re.search(r"\bV([\d.]+)", said).group(1)


def bill_of_materials(version, needed, cuda_runtime):
    """What the package consists of and needs, as CycloneDX 1.5 has it: `needed` are distributions with their versions
    or None, `cuda_runtime` the version of the one that is linked in, or None."""
    name = PACKAGE.replace("_", "-")
    component = {"type": "library", "bom-ref": name, "name": name, "version": version}
    component["licenses"] = [{"license": {"id": "Apache-2.0"}}]
    others = []
    for other, found in needed.items():
        versions = {"version": found} if found else {}
        purl = f"pkg:pypi/{other}" + (f"@{found}" if found else "")
        others.append({"type": "library", "bom-ref": other, "name": other, **versions, "purl": purl})
    if cuda_runtime:
        runtime = {"type": "library", "bom-ref": "cudart", "name": "NVIDIA CUDA Runtime", "version": cuda_runtime}
        others.append({**runtime, "description": "linked into the operator library"})
    dependencies = [{"ref": name, "dependsOn": [other["bom-ref"] for other in others]}]
    document = {"bomFormat": "CycloneDX", "specVersion": "1.5", "version": 1, "metadata": {"component": component}}
    return json.dumps({**document, "components": others, "dependencies": dependencies}, indent=2) + "\n"


def gencode_flags(architectures):
    flags = []
    for name in architectures:
        number = name.replace("+PTX", "")
        flags += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
        if name != number:
            flags += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
    return flags


def checksum(compilers):
    return f"{zlib.crc32(repr(compilers).encode()):08x}"


class Toolchain:
    """The commands that compile one source and link the library, from what paddle.utils.cpp_extension says of
    Paddle."""

    def __init__(self, paddle):
        cxx = find_cxx()
        self.with_cuda = paddle.is_compiled_with_cuda()
        core_sources = find(CORE_SOURCES) + (find(CORE_CUDA_SOURCES) if self.with_cuda else [])
        operator_sources = find(OPERATOR_SOURCES)
        # Paddle 3.3.1 reads this variable too, and fails on names such as 9.0a.
        requested = os.environ.pop("PADDLE_CUDA_ARCH_LIST", "")
        architectures = cuda_architectures(paddle, requested) if self.with_cuda else []
        if self.with_cuda:
            cuda_home = find_cuda_home()
            os.environ["CUDA_HOME"] = cuda_home  # where CUDAExtension looks first

        from paddle.utils.cpp_extension import CppExtension, CUDAExtension

        make_extension = CUDAExtension if self.with_cuda else CppExtension
        paddle_says = make_extension(operator_sources, extra_compile_args={"cxx": [], "nvcc": []})
        defines = [*DEFINES, *(["-DPFA_WITH_CUDA"] if self.with_cuda else [])]
        operator_defines = [*OPERATOR_DEFINES, *(["-DPADDLE_WITH_CUDA"] if self.with_cuda else [])]
        cuda_includes = [os.path.join(cuda_home, "include", name) for name in ("", "cccl")] if self.with_cuda else []
        includes = [f"-I{path}" for path in ("custom_ops", *cuda_includes)]
        operator_includes = [f"-I{path}" for path in ("custom_ops", *paddle_says.include_dirs, *cuda_includes)]

        cxx_flags = [*CXX_FLAGS, *defines]
        user_flags = shlex.split(os.environ.get("CXXFLAGS", ""))
        core = {".cc": [*cxx, *cxx_flags, *includes, *user_flags]}
        if self.with_cuda:
            nvcc = [
                os.path.join(cuda_home, "bin", "nvcc"),
                "-ccbin",
                cxx[-1],
                *NVCC_FLAGS,
                *gencode_flags(architectures),
            ]
            core[".cu"] = [*nvcc, *defines, *includes]
        operator = {".cc": [*cxx, *cxx_flags, *paddle_says.extra_compile_args["cxx"]]}
        operator[".cc"] += [*operator_defines, *operator_includes, *user_flags]
        # Each source with its command and its object. Objects of other commands live side by side, so that a change
        # from one Paddle to another compiles nothing twice. The core includes none of Paddle's headers, so its objects
        # serve every Paddle.
        self.compilations = [
            (
                source,
                compilers[Path(source).suffix],
                Path("build", "objects", f"{name}-{checksum(compilers)}", source + ".o"),
            )
            for sources, compilers, name in (
                (core_sources, core, "core"),
                (operator_sources, operator, f"paddle-{paddle.__version__}"),
            )
            for source in sources
        ]

        has_iomp = os.path.exists(os.path.join(paddle.sysconfig.get_lib(), "libiomp5.so"))
        self.linker = [*cxx, "-shared"]
        self.link_flags = [
            flag for path in paddle_says.library_dirs for flag in (f"-L{path}", f"-Wl,-rpath-link,{path}")
        ]
        self.link_flags += [f"-Wl,-rpath,{path}" for path in paddle_says.runtime_library_dirs]
        self.link_flags += [flag for flag in paddle_says.extra_link_args if flag != "-lcudart"]
        self.link_flags.append("-l:libiomp5.so" if has_iomp else "-fopenmp")
        self.link_flags += CUDA_LINK_FLAGS if self.with_cuda else []
        self.link_flags += shlex.split(os.environ.get("LDFLAGS", ""))
        distribution = "paddlepaddle-gpu" if self.with_cuda else "paddlepaddle"
        self.needed = {distribution: paddle.__version__}
        self.cuda_runtime = cuda_version(cuda_home) if self.with_cuda else None
        self.build_info = (
            "# Written by setup.py: what the operator library beside this file was built for.\n"
            f'PADDLE_VERSION = "{paddle.__version__}"\nWITH_CUDA = {self.with_cuda}\n'
            f"CUDA_ARCHITECTURES = {tuple(architectures)}\n"
        )


class BuildOperator(build_ext):
    """Compiles what changed, in parallel, and stops at the first error.

    Paddle's BuildExtension is not used: after a failed compilation 3.3.1 goes on with whatever objects are there, 2.6.2
    puts all objects into one folder where equal file names collide, and both compile everything anew each time.
    """

    def get_ext_filename(self, fullname):
        return os.path.join(*fullname.split(".")) + ".so"

    def run(self):
        self.toolchain = Toolchain(import_paddle())
        super().run()
        package = Path("python" if self.inplace else self.build_lib, PACKAGE)
        (package / "_build_info.py").write_text(self.toolchain.build_info)
        needed = {**self.toolchain.needed, **dict.fromkeys(self.distribution.install_requires)}
        bill = bill_of_materials(self.distribution.get_version(), needed, self.toolchain.cuda_runtime)
        (package / "bill_of_materials.cdx.json").write_text(bill)

    def build_extension(self, ext):
        tools = self.toolchain
        newest_header = max(map(os.path.getmtime, find(HEADERS)))
        jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)

        def compile_source(source, command, target):
            needed = max(newest_header, os.path.getmtime(source))
            if not target.exists() or target.stat().st_mtime <= needed:
                target.parent.mkdir(parents=True, exist_ok=True)
                partial = str(target) + ".partial"
                self.spawn([*command, "-c", source, "-o", partial])
                os.replace(partial, target)
            return str(target)

        with ThreadPoolExecutor(jobs) as pool:
            futures = [pool.submit(compile_source, *compilation) for compilation in tools.compilations]
            try:
                objects = [future.result() for future in futures]
            except BaseException:
                for future in futures:
                    future.cancel()
                raise

        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        self.spawn([*tools.linker, *objects, "-o", str(library), *tools.link_flags])


# setuptools 77 warns of every other form than an SPDX expression, which none before it knows, in pyproject.toml either.
KNOWS_EXPRESSIONS = hasattr(setuptools.Distribution().metadata, "license_expression")
LICENSE = {"license_expression" if KNOWS_EXPRESSIONS else "license": "Apache-2.0"}

setuptools.setup(
    ext_modules=[setuptools.Extension(f"{PACKAGE}._C", find(CORE_SOURCES + OPERATOR_SOURCES), depends=find(HEADERS))],
    cmdclass={"build_ext": BuildOperator},
    **LICENSE,
)
