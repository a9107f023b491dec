"""Measure quantized variants against the floating model, and write a report that anyone can open in a browser.

Run it with `python tutorials/05_evaluate_and_report.py`; it takes half a minute on two cores and needs no download.
"""

from mixdq_ao import MixDQConfig, calibrate, families
from mixdq_ao.evaluate import evaluate
from mixdq_ao.pipelines import load_pipeline
from mixdq_ao.plan import BitPlan
from mixdq_ao.prompts import built_in_prompts
from mixdq_ao.report import Point, write_report

pipe = load_pipeline("tiny-sdxl")
params = calibrate(pipe, built_in_prompts(16, scenes=True))
shapes = families.layer_shapes(pipe.unet)

# 4 bits for every layer but the first and the last, which see and make the picture itself.
ends = {"conv_in", "conv_out"}
plan = BitPlan({name: 8 if name in ends else 4 for name in shapes}, source="ends at 8 bits")

# The same captions and the same noise for all: what differs is the quantization alone. Two seeds say how much of a
# difference is chance. With out="evaluation" a run that is stopped goes on where it was.
result = evaluate(
    pipe,
    {
        "W8A8": MixDQConfig(params),
        "W4A8": MixDQConfig(params, weight_bits=4),
        "W4A8, ends at 8 bits": MixDQConfig(params, weight_bits=plan),
    },
    built_in_prompts(8, scenes=True, held_out=True),
    seeds=(0, 1),
)
print("\t".join(result.header()))
for cells in result.table():
    print("\t".join(cells))

write_report(
    "report.html",
    result,
    title="Three ways to quantize the small model",
    plan=plan,
    shapes=shapes,
    points=[Point(row.name, row.weight_bits, row.mean("ssim"), "uniform") for row in result.rows[1:]],
    facts={"Calibration": "16 captions", "Evaluation": "8 held-out captions, 2 seeds"},
)
print("report.html shows the pictures side by side")
