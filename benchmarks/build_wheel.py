"""Build a wheel with the CUDA kernels; print how long it took and how large it is.

    python benchmarks/build_wheel.py [--out dist] [--archs '80;86;89+PTX;90a']

Needs what the README's 'Install with CUDA kernels' lists. Objects that are up to date are not compiled again; remove
build/cuda to measure the whole build.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument("--archs", default="", help="as MIXDQ_CUDA_ARCHS; default: all")
    args = parser.parse_args()
    environ = os.environ | {"MIXDQ_CUDA": "1"} | ({"MIXDQ_CUDA_ARCHS": args.archs} if args.archs else {})
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out) as folder:
        command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps", "-w", folder, ROOT]
        began = time.monotonic()
        subprocess.run([str(c) for c in command], env=environ, check=True)
        seconds = time.monotonic() - began
        (built,) = Path(folder).glob("*.whl")
        wheel = built.replace(args.out / built.name)
    print(f"{wheel}: {wheel.stat().st_size / MIB:.1f} MiB after {seconds / 60:.1f} min")
    for info in zipfile.ZipFile(wheel).infolist():
        if info.filename.endswith(".so"):
            print(f"  {info.filename}: {info.file_size / MIB:.1f} MiB, {info.compress_size / MIB:.1f} MiB packed")


if __name__ == "__main__":
    main()
