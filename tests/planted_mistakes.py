"""Which mistakes in the kernels the emulated tests find: plants one after another and runs the tests of that kernel.

``python tests/planted_mistakes.py`` takes about a minute for each, on two cores, and ends with 1 if one was not found.
"""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import emulated
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Mistake:
    what: str
    file: str
    right: str  # a regular expression that is there once or more; the first is replaced
    wrong: str
    tests: str  # for pytest -k


MATMUL = "sm90/matmul.cuh"
MISTAKES = [
    Mistake(
        "a slot counts as empty one warp too early",
        MATMUL,
        r"C::kPingPong \? 4 :",
        "C::kPingPong ? 3 :",
        "random_problems and sm90_128x128",
    ),
    Mistake(
        "a warp prepares a stage whose use before is not over",
        "sm90/prepare.cuh",
        r"EmptyBarrier::wait\(sm.empty\(turn.stage\), turn.phase \^ 1\);\n",
        "\n",
        "random_problems and sm90_64x80_packed",
    ),
    Mistake(
        "spread codes are not fenced for the tensor cores",
        "sm90/prepare.cuh",
        r"cutlass::arch::fence_view_async_shared\(\);",
        "",
        "random_problems and sm90_64x160_packed",
    ),
    Mistake(
        "a stage counts as spread one lane too early",
        MATMUL,
        r"C::packed \? 1 \+ 32 :",
        "C::packed ? 32 :",
        "random_problems and sm90_64x80_packed",
    ),
    Mistake(
        "codes of floats lie in the swizzle of other rows",
        "sm90/encode.cuh",
        r"piece \^ row % 8",
        "piece ^ row / 2 % 8",
        "quantizing_in_the_product and 64x80",
    ),
    Mistake(
        "a stage counts as encoded when one of the warps is done",
        "sm90/prepare.cuh",
        r"cutlass::arch::NamedBarrier::sync\([^;]*;",
        "",
        "quantizing_in_the_product and 64x80",
    ),
    Mistake(
        "a known token's output is there before the row is written",
        "sm90/known_token.cuh",
        r"__syncwarp\(\);",
        "",
        "known_first_tokens_in_the_product",
    ),
    Mistake(
        "a scale is read that the kernel ahead may still write",
        "sm90/encode.cuh",
        r"wait_for_previous\(\);",
        "",
        "quantizing_in_the_product and 64x80",
    ),
    Mistake(
        "the groups of a ping-pong kernel do not take turns",
        MATMUL,
        r"if \(C::kPingPong && index != int\(blockIdx.x\)\) await_turn\(group\);",
        "",
        "random_problems and sm90_128x160",
    ),
    Mistake(
        "columns are overwritten while a warp still needs them",
        MATMUL,
        r"if \(!C::kPingPong\) sync_group\(group\);",
        "",
        "random_problems and sm90_256x128",
    ),
    Mistake(
        "sums of a split reduction are read before they are there",
        MATMUL,
        r"cooperative_groups::this_cluster\(\).sync\(\);",
        "__syncthreads();",
        "random_problems and sm90_64x64",
    ),
    Mistake(
        "a block of a cluster ends while others read its sums",
        MATMUL,
        r"cute::cluster_wait\(\);",
        "",
        "random_problems and sm90_64x64",
    ),
    Mistake(
        "a buffer is written while a copy still reads it",
        "sm90/epilogue.cuh",
        r"cute::tma_store_wait<C::kBuffers - 1>\(\);",
        ";",
        "random_problems and sm90_64x160 and not sharing",
    ),
    Mistake(
        "outputs are not fenced for the copies that take them away",
        "sm90/epilogue.cuh",
        r"cutlass::arch::fence_view_async_shared\(\);",
        "",
        "random_problems and sm90_64x64 and not sharing",
    ),
    Mistake(
        "a block tells only itself that a shared slot is empty",
        "sm90/multiply.cuh",
        r"if \(lane < blocks\) EmptyBarrier",
        "if (lane == 0) EmptyBarrier",
        "random_problems and sm90_64x64_sharing",
    ),
    Mistake(
        "a block is gone when the last slots are told to be empty",
        "sm90/load.cuh",
        r"for \(int i = 0; i < C::kStages; \+\+i, turn.step\(\)\) EmptyBarrier::wait\([^;]*;",
        ";",
        "random_problems and pairs",
    ),
    Mistake(
        "gates lie where the values are",
        "sm90/load.cuh",
        r"sm.weight\(stage\) \+ C::kTileOut \* row",
        "sm.weight(stage)",
        "geglu_in_the_product",
    ),
    Mistake(
        "a descriptor's stride",
        "sm90/wgmma.cuh",
        r"every \* kBytes / 2",
        "every * 32",
        "random_problems and sm90_128x64",
    ),
    Mistake(
        "a half step's rows lie as far apart as those of a whole one",
        "sm90/multiply.cuh",
        r"row0 \* kBytes",
        "row0 * kRowBytes",
        "random_problems and sm90_256x128 or random_problems and sm90_128x160_split",
    ),
    Mistake(
        "the corner of a dilated window",
        "sm90/tensor_map.cu",
        r"-\(p.window.s - 1\) \* p.window.dilation_w",
        "-(p.window.s - 1)",
        "random_problems and sm90_64x80",
    ),
    Mistake(
        "cp.async is waited for one group too late",
        "sm80/matmul.cuh",
        r"cp_async_wait<C::kStages - 2>\(\);\n    sync_group",
        "cp_async_wait<C::kStages - 1>();\n    sync_group",
        "random_problems and sm80_64x64",
    ),
    Mistake(
        "a stage is overwritten while a warp reads it",
        "sm80/matmul.cuh",
        r"cp_async_wait<C::kStages - 2>\(\);\n    sync_group<C>\(group\);",
        "cp_async_wait<C::kStages - 2>();",
        "random_problems and sm80_128x80",
    ),
    Mistake(
        "rows past the end are read",
        "sm80/matmul.cuh",
        r"first_pixel\(min\((.*), m - 1\)\)",
        r"first_pixel(\1)",
        "random_problems and sm80_128x128",
    ),
    Mistake(
        "a warp does not wait for the epilogue's vectors",
        "direct.cu",
        r"(weight_sum\[threadIdx.x\] = channel.weight_sum;\n  \}\n)  __syncthreads\(\);\n",
        r"\1",
        "few_channels",
    ),
    Mistake(
        "vectors are taken for aligned that are not",
        "tile.cuh",
        r"\) % bytes == 0;",
        ") % 4 == 0;",
        "random_problems and sm80_128x128",
    ),
    Mistake(
        "the epilogue's vectors are read before the kernel ahead has written them",
        "sm80/matmul.cuh",
        r"(  wait_for_previous\(\);\n  let_next_start\(\);\n(?:.*\n)*?.*fence\(\);\n  \}\n)((?:.*\n){5})",
        r"\2\1",
        "random_problems and sm80_64x64",
    ),
    Mistake(
        "the math groups do not wait for the kernel ahead",
        MATMUL,
        r"(warpgroup_reg_alloc<232>\(\);\n  warm_parameters\(p\);\n)  wait_for_previous\(\);",
        r"\1",
        "random_problems and sm90_128x128",
    ),
    Mistake(
        "weights are read before the kernel ahead has unpacked them",
        "ops/multiply.cpp",
        r"on.dependent && !fresh_weights",
        "on.dependent",
        "random_problems and sm90_128x160 and not packed",
    ),
    Mistake(
        "the next kernel may start before this one has waited",
        "layer_norm.cu",
        r"wait_for_previous\(\);\n  let_next_start\(\);",
        "let_next_start();\n  wait_for_previous();",
        "layer_norm_quantize",
    ),
    Mistake(
        "a known first row is written before the product under it",
        "bos.cu",
        r"wait_for_previous\(\);\n  let_next_start\(\);\n",
        "",
        "known_first",
    ),
    Mistake(
        "pixels do not share the residual of their image",
        "rows.cu",
        r"residual_row\(p, my_row\)",
        "my_row * p.residual_stride",
        "share_a_row",
    ),
    Mistake(
        "the second group of a split tile writes its sums over the first one's",
        MATMUL,
        r"sm.sums\(\) \+ \(row0 \+ ",
        "sm.sums() + (",
        "random_problems and sm90_128x128_split",
    ),
    Mistake(
        "shares of a cluster are read before its other blocks have them",
        "group_norm.cu",
        r"cluster.sync\(\);",
        "__syncthreads();",
        "group_norm_quantize",
    ),
    Mistake(
        "a block of a cluster ends while others read its shares",
        "group_norm.cu",
        r"cluster.barrier_wait\(\);",
        "",
        "group_norm_quantize",
    ),
    Mistake(
        "the second kernel of a norm begins a pixel late",
        "group_norm.cu",
        r"int begin = chunk \* chunk_pixels,",
        "int begin = chunk * chunk_pixels + 1,",
        "group_norm_quantize",
    ),
    Mistake(
        "a vector counts wholly in its first group",
        "group_norm.cu",
        r"bool begins_here = w \* kVector >= channel;",
        "bool begins_here = true;",
        "group_norm_quantize",
    ),
    Mistake(
        "a zero point that is no whole number is rounded with the code",
        "codes.cuh",
        r"if \(shifted_zero_point - kShift != zero_point\) shifted_zero_point = none;",
        "",
        "layer_norm_quantize",
    ),
    Mistake(
        "a code is rounded twice",
        "codes.cuh",
        r"return round\(q == q \? q : 0.f\)",
        "return round(rintf(q))",
        "quantize",
    ),
    Mistake(
        "the warps of a block do not wait for each other's values",
        "attention_few_keys.cu",
        r"cp_async_wait<1>\(\);\n      __syncthreads\(\);",
        "cp_async_wait<1>();",
        "random_problems and few:",
    ),
    Mistake(
        "a warp does not wait for its next rows",
        "attention_few_keys.cu",
        r"row0 \+= step;\n    cute::cp_async_wait<0>\(\);",
        "row0 += step;",
        "random_problems and few:",
    ),
    Mistake(
        "keys past the last count",
        "attention_few_keys.cu",
        r"i < p.keys \? 1.f : 0.f",
        "1.f",
        "random_problems and few:",
    ),
    Mistake(
        "the threads of a row do not wait for its range",
        "quantize.cu",
        r"(shared\[1\]\[threadIdx.x / 32\] = high;\n)    __syncthreads\(\);\n",
        r"\1",
        "per_token",
    ),
]


def fail(sources: dict[Path, str], tests: str, folder: Path) -> bool:
    """Whether one of those tests fails with a library from the sources, built in the folder."""
    options = ["-x", "-n", "1", "-p", "no:cacheprovider", "-k", tests]
    files = [Path(__file__).with_name(name) for name in ("test_cuda_kernels.py", "test_attention_kernel.py")]
    command = [sys.executable, "-m", "pytest", *files, *options]
    settings = {"MIXDQ_EMULATED_LIBRARY": str(emulated.build(sources, folder)), "MIXDQ_CASES": "40"}
    done = subprocess.run(
        command, env=os.environ | settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if not re.search(r"\d+ (passed|failed)", done.stdout):
        raise SystemExit(done.stdout)
    return done.returncode != 0


def is_found(mistake: Mistake, folder: Path) -> bool:
    sources = emulated.read_sources()
    path = Path(mistake.file)
    text, count = re.subn(mistake.right, mistake.wrong, sources[path], count=1)
    if not count:
        raise SystemExit(f"{mistake.what}: {mistake.file} no longer has {mistake.right}")
    return fail(sources | {path: text}, mistake.tests, folder)


def main() -> int:
    table = Table("mistake", "file", "found", title="Mistakes planted in the kernels")
    console, missed, folder = Console(), 0, emulated.BUILD / "mistakes"
    with console.status("the same tests without a mistake"):
        if fail(emulated.read_sources(), "random_problems or quantize", folder):
            raise SystemExit("Tests fail without any mistake: mend that first.")
    for mistake in MISTAKES:
        with console.status(f"{mistake.what} ({mistake.file})"):
            found = is_found(mistake, folder)
        table.add_row(mistake.what, mistake.file, "yes" if found else "no")
        missed += not found
    console.print(table)
    return min(missed, 1)


if __name__ == "__main__":
    sys.exit(main())
