"""Look into the built distributions: the package and its marker of types are in, tests and weights are not.

python .ci/check_release.py dist
"""

import re
import sys
import tarfile
import zipfile
from pathlib import Path


WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".onnx", ".npz")
LARGEST = 2 * 2**20  # bytes of a distribution; the code and its documentation are far smaller


def main(folder: Path) -> None:
    (wheel,), (source,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    version = re.search(r'__version__ = "(.+)"', Path("gma_hf/__init__.py").read_text(encoding="utf-8")).group(1)
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = archive.namelist()
        entry_points = archive.read(f"gma_hf-{version}.dist-info/entry_points.txt").decode()
    with tarfile.open(source) as archive:
        in_source = [name.split("/", 1)[1] for name in archive.getnames() if "/" in name]

    modules = {str(path) for path in Path("gma_hf").rglob("*.py")}
    problems = [f"the wheel lacks {name}" for name in sorted({*modules, "gma_hf/py.typed"} - set(in_wheel))]
    problems += [f"the wheel has no command {name}" for name in ("gma-hf",) if name not in entry_points]
    strangers = {name.split("/")[0] for name in in_wheel} - {
        "gma_hf",
        "gma_hf_command.py",
        f"gma_hf-{version}.dist-info",
    }
    problems += [f"the wheel holds {name}, which is no part of the package" for name in sorted(strangers)]
    problems += [f"the wheel holds weights: {name}" for name in in_wheel if name.endswith(WEIGHTS)]
    problems += [
        f"the source distribution holds weights: {name}"
        for name in in_source
        if name.endswith(WEIGHTS) and not name.startswith("tests/data/")
    ]
    problems += [f"the source distribution lacks {name}" for name in ("LICENSE", "README.md") if name not in in_source]
    problems += [
        f"{path.name} has {path.stat().st_size:,} bytes" for path in (wheel,) if path.stat().st_size > LARGEST
    ]
    if problems:
        sys.exit("\n".join(problems))
    print(
        f"{wheel.name}: {len(in_wheel)} files; {source.name}: {len(in_source)} files; nothing is missing or too much"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
