"""Everything that needs a GPU, step by step: tests, the table of kernels, benchmarks, NVIDIA's checkers.

    python benchmarks/run_all.py --out results                       all of it; about 45 minutes on an H200
    python benchmarks/run_all.py --out results --only tests,tune --minutes 9

Each step has a limit and does not stop the others by failing. A table that ``tune`` has written is used by the steps
after it. What they print is in OUT/log.txt, how they ended in OUT/steps.json, written after each step; ``claims.py``
compares the results with the project's goals.
"""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from gpu import environment, require_gpu
from rich.console import Console
from rich.table import Table

from mixdq_ao.files import write_text

ROOT = Path(__file__).resolve().parents[1]
TABLE, LOG, STEPS = "tuning_table.inc", "log.txt", "steps.json"
SHORTEST = 20.0  # seconds; with less left a step is not begun


@dataclass(frozen=True)
class Step:
    """Commands, one after the other or ``together``, and the seconds that they may take in all."""

    name: str
    what: str
    seconds: float
    commands: Sequence[Sequence[str]]
    together: bool = False


@dataclass(frozen=True)
class Ended:
    """How a step ended: "ok", "failed", "out of time", or "left out"; ``last``: the last line that it printed."""

    name: str
    how: str
    seconds: float
    last: str = ""


def steps(out: Path, gpus: int, scratch: Path, plan: Path | None = None) -> list[Step]:
    """All there are, in the order in which they tell most.

    ``scratch``: an empty folder for what nobody wants afterwards. ``plan``: of SDXL's weights, as one more variant.
    """
    python = [sys.executable]
    pytest = [*python, "-m", "pytest", "-p", "no:cacheprovider", "--tb=short"]
    limit = ["--timeout=60", "--timeout-method=thread"] if importlib.util.find_spec("pytest_timeout") else []
    kernel_tests, alone = "tests/test_cuda_kernels.py", "test_memory_comes_from_torch"

    def script(name: str, *arguments: str) -> list[str]:
        return [*python, str(ROOT / "benchmarks" / name), *arguments]

    def bench(name: str, *arguments: str) -> list[str]:
        return [*python, "-m", "mixdq_ao", "bench", "sdxl", *arguments, f"--out={out}/bench_{name}.json", "--force"]

    def unet(pixels: int, batch: int, *more: str) -> list[str]:
        name, variants = f"{pixels}px_batch{batch}", ",".join(("float", "float-compiled", "w8a8", "w4a8", *more))
        arguments = [f"--size={pixels}", f"--batch={batch}", f"--variants={variants}"]
        return bench(name, *arguments, "--jobs=8", "--compile-limit=340", f"--plot={out}/bench_{name}.png")

    def checker(tool: str, share: str) -> list[str]:
        options = ["--tool", tool, "--error-exitcode", "1", "--print-limit", "20"]
        options += ["--check-api-memory-access", "no"] if tool == "initcheck" else []
        return ["compute-sanitizer", *options, *script("sanitize.py", f"--share={share}")]

    tests = [  # A launch that hangs ends its worker.
        [*pytest, *limit, "-n", "4", "--dist", "load", kernel_tests, "tests/test_attention_kernel.py",
         f"--deselect={kernel_tests}::{alone}"],
        [*pytest, *limit, "-n", "0", kernel_tests, "-k", alone],
    ]  # fmt: skip
    replays = "tests/test_bench.py::test_on_a_gpu_graphs_are_replayed_and_weights_are_held_once"
    # Compilers are in each other's way unless each keeps to the cores that are there for it.
    compilers = ["env", f"TORCHINDUCTOR_COMPILE_THREADS={max(1, (os.cpu_count() or 1) // 8)}"]
    models = [*compilers, *pytest, "-vv", "-n", "8", "--dist", "load", "tests/test_cuda.py",
              "tests/test_cuda_compile.py", replays]  # fmt: skip
    tune = script("tune.py", f"--table={out / TABLE}", f"--out={out}/tune.json", "--seconds=120")
    # Side by side they compile; each of them is alone while it tunes.
    in_a_step = [
        script("tune_step.py", f"--size={size}", f"--variant={variant}", f"--table={out / TABLE}",
               f"--from={out}/tune.json", f"--out={out}/tune_step_{size}px_{variant}.json", "--seconds=100")
        for variant in ("w8a8", "w4a8") for size in (512, 1024)
    ]  # fmt: skip
    kernels = script("kernels.py", f"--out={out}/kernels.json", "--seconds=120")
    attention = script("attention.py", f"--out={out}/attention.json")
    tools, shares = ("memcheck", "racecheck", "initcheck", "synccheck"), ("1/4", "2/4", "3/4", "4/4")
    checkers = [checker(tool, share) for tool in tools for share in shares]
    others = ("w8a8-eager", "w8a8-no-inductor", "w8a16", "torchao-fp8", "torchao-int8")
    small = unet(512, 1, *others, *(["plan"] if plan else []))
    unets = [[*small, *([f"--plan={plan}"] if plan else [])], unet(1024, 8, "torchao-fp8")]
    # Side by side, compilers slow one another: what compiling takes is measured alone, first with an empty cache, then
    # with what that has left there.
    cache = f"TORCHINDUCTOR_CACHE_DIR={scratch / 'starts'}"
    eager = script("eager.py", f"--out={out}/eager.json")
    starts = [["env", cache, *bench(name, f"--variants={variants}", "--no-cold", "--repeats=3")]
              for name, variants in (("cold", "float-compiled,w8a8"), ("warm", "w8a8"))]  # fmt: skip
    older = ["env", "MIXDQ_KERNEL=sm80", *bench("sm80", "--variants=float,w8a8-eager,w8a8-no-inductor,w8a8")]
    sensitivity = script("sensitivity.py", f"--out={out}/sensitivity.json")
    processes = [*python, "-m", "torch.distributed.run", f"--nproc-per-node={gpus}", *sensitivity[1:]]
    return [
        Step("tests", "kernels and operators against exact integers", 200, tests),
        Step("tune", "the fastest kernel for each layer of SDXL", 160, [tune]),
        Step("tune-step", "the fastest kernels for a whole step", 590, in_a_step, together=True),
        Step("kernels", "each layer of SDXL", 200, [kernels]),
        Step("attention", "SDXL's attention", 60, [attention]),
        Step("models", "UNets, eager and compiled", 560, [models]),
        Step("sanitize", "compute-sanitizer", 400, checkers, together=True),
        Step("unets", "SDXL's UNet, small and large", 500, unets, together=True),
        Step("more-unets", "SDXL's UNet between them", 400, [unet(1024, 1), unet(512, 8)], together=True),
        Step("eager", "calls for which the host's time counts", 200, [eager]),
        Step("older", "SDXL's UNet with the kernels of older GPUs", 240, [older]),
        Step("starts", "how long compiling takes", 500, starts),
        Step("sensitivity", "SDXL's sensitivity", 180, [sensitivity, *([processes] if gpus > 1 else [])]),
    ]


def run_step(step: Step, seconds: float, log: Path, settings: dict[str, str]) -> Ended:
    """Run its commands, kill what is left of them at the limit, and append what they printed to the log."""
    start = time.monotonic()
    if absent := [command[0] for command in step.commands if not shutil.which(command[0])]:
        return Ended(step.name, "failed", 0.0, f"{absent[0]} is not installed")
    groups = [step.commands] if step.together else [[command] for command in step.commands]
    codes, last = [], ""
    for group in groups:
        if None in codes:
            break
        running = []
        for command in group:
            output = tempfile.TemporaryFile("w+b")
            # A session of its own: what it started is killed with it.
            process = subprocess.Popen(
                command, cwd=ROOT, env=os.environ | settings, stdout=output, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
            running.append((command, process, output))
        for command, process, output in running:
            code = wait(process, start + seconds - time.monotonic())
            output.seek(0)
            text = output.read().decode(errors="replace")
            output.close()
            with log.open("a") as file:
                how = "out of time" if code is None else f"exit code {code}"
                file.write(f"$ {' '.join(map(str, command))}\n{text.rstrip()}\n[{step.name}: {how}]\n\n")
            said = [line.strip() for line in text.splitlines() if re.search(r"\w", line)]
            last = said[-1] if said else last
            codes.append(code)
    how = "out of time" if None in codes else "failed" if any(codes) else "ok"
    return Ended(step.name, how, round(time.monotonic() - start, 1), last)


def wait(process: subprocess.Popen, seconds: float) -> int | None:
    """The exit code; None if it had to be killed. Nothing of its session is left either way."""
    try:
        return process.wait(max(0.0, seconds))
    except subprocess.TimeoutExpired:
        return None
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()


def show(console: Console, ended: Sequence[Ended]) -> None:
    table = Table("step", "", "s", "last line")
    for e in ended:
        table.add_row(e.name, e.how, f"{e.seconds:.0f}", e.last[:90])
    console.print(table)


def run_all(todo: Sequence[Step], out: Path, seconds: float, facts: dict, console: Console) -> list[Ended]:
    deadline, ended = time.monotonic() + seconds, []
    for step in todo:
        left = min(step.seconds, deadline - time.monotonic())
        if left < min(SHORTEST, step.seconds):
            ended.append(Ended(step.name, "left out", 0.0, "no time is left"))
        else:
            console.print(f"{step.name}: {step.what}; up to {left:.0f} s", highlight=False)
            tuned = (out / TABLE).exists() and step.name != "tune"
            settings = {"MIXDQ_TUNING_TABLE": str(out / TABLE)} if tuned else {}
            ended.append(run_step(step, left, out / LOG, settings))
            e = ended[-1]
            console.print(f"  {e.how}, {e.seconds:.0f} s: {e.last}", highlight=False, markup=False)
        write_text(out / STEPS, json.dumps({**facts, "steps": [asdict(e) for e in ended]}, indent=1) + "\n")
    return ended


def main(
    out: Annotated[Path, typer.Option(help="Folder for everything that is written.")],
    only: Annotated[str, typer.Option(help="Names of steps with commas between; all of them without it.")] = "",
    minutes: Annotated[float, typer.Option(help="Time for all; steps that no longer fit are left out.")] = 60.0,
    plan: Annotated[Path | None, typer.Option(exists=True, help="A bit plan of SDXL's weights to measure too.")] = None,
) -> None:
    """Test and measure on this GPU."""
    require_gpu()
    import torch

    out = out.resolve()
    console = Console(width=150)
    with tempfile.TemporaryDirectory() as scratch:
        todo = steps(out, torch.cuda.device_count(), Path(scratch), plan and plan.resolve())
        if only:
            wanted, known = [name.strip() for name in only.split(",")], [step.name for step in todo]
            if unknown := [name for name in wanted if name not in known]:
                raise SystemExit(f"There is no step {', '.join(unknown)}. The steps are {', '.join(known)}.")
            todo = [step for step in todo if step.name in wanted]
        out.mkdir(parents=True, exist_ok=True)
        # Where torch lies in a folder that cannot be written, each process would compile Python's sources anew: a
        # second or two of every first call.
        os.environ["PYTHONPYCACHEPREFIX"] = os.path.join(scratch, "bytecode")
        ended = run_all(todo, out, minutes * 60, environment(), console)
    show(console, ended)
    if any(e.how != "ok" for e in ended):
        raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)
